// emulated_gpu.h: whose kernels the emulated GPU has

#pragma once

// The Metal kernels (metal_emulation.h), or else those of CUDA (simt_emulation.h), which it begins with. For what is computed from now on.
void qcache_emulated_gpu_use(bool metal);
