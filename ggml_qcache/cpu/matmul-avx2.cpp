// matmul-avx2.cpp: products with packed weights by AVX2. Flags: -mavx2 -mfma -mf16c

#define QM_KERNEL     qcache_matmul_kernel_avx2
#define QM_NAME       "avx2"
#define QM_HAS_DPBUSD 0

#include "matmul-avx2.inl.h"
