// matmul-avxvnni.cpp: products with packed weights by AVX-VNNI. Flags: -mavxvnni -mavx2 -mfma -mf16c

#define QM_KERNEL     qcache_matmul_kernel_avxvnni
#define QM_NAME       "avxvnni"
#define QM_HAS_DPBUSD 1

#include "matmul-avx2.inl.h"
