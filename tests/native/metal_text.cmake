# metal_text.cmake: qcache.metal without [[attributes]], which C++ could not read once `threadgroup` means nothing; function
# constants become values that can be set. cmake -DIN=qcache.metal -DOUT=qcache-emulated.metal -P metal_text.cmake

file(READ "${IN}" text)
string(REGEX REPLACE "constant int ([a-z_]+) \\[\\[function_constant\\(([0-9]+)\\)\\]\\];" "static int & \\1 = ::metal_function_constants[\\2];" text "${text}")
string(REGEX REPLACE "\\[\\[[^]]*\\]\\]" "" text "${text}")
file(WRITE "${OUT}" "${text}")
