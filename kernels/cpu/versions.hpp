// For loops that run outside the units of isa/: copies per instruction set, chosen at load.
#pragma once

// One more copy of each function for every instruction set named, chosen by the dynamic loader from
// what the processor reports, so that no machine meets an instruction it lacks. Needs glibc's indirect
// functions.
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && \
    !defined(__clang__) && !defined(__SANITIZE_THREAD__)
#define ER_VERSIONS __attribute__((target_clones("avx2", "default")))
#define ER_WIDE_VERSIONS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ER_VERSIONS
#define ER_WIDE_VERSIONS
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define ER_KEEP_LOOP _Pragma("GCC unroll 1")  // GCC would unroll it before it could vectorise it
#else
#define ER_KEEP_LOOP
#endif

#define ER_RESTRICT __restrict
#define ER_INLINE inline __attribute__((always_inline))
