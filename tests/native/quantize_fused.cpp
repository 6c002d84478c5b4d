// quantize_fused.cpp: the kernel of AVX2 as a ggml that fuses multiplications and additions would round, to test that it is told apart.
// Flags: -mavx2 -mfma -mf16c -ffp-contract=fast

#define qcache_quantize_avx2 quantize_fused
#include "cpu/quantize-avx2.cpp"
