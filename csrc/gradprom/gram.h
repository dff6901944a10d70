// The Gram matrix of the gradients: the one object that every gate, norm and clip follows from.
#pragma once

#include "gradprom/platform.h"

namespace gradprom {

// Entries <g_i, g_j> of a symmetric N x N matrix, upper triangle row by row, in fp64.
GP_HD constexpr int gram_size(int n) { return n * (n + 1) / 2; }

GP_HD constexpr int gram_index(int n, int i, int j) {
  const int lo = i < j ? i : j;
  const int hi = i < j ? j : i;
  return lo * n - lo * (lo - 1) / 2 + (hi - lo);
}

inline constexpr int kMaxGram = gram_size(kMaxGrads);

// x - x is 0 for every finite x and NaN for an infinity or a NaN: a test that needs no library and that the
// compiler may not fold away (the core is never built with -ffast-math).
GP_HD bool is_finite(double x) { return x - x == 0.0; }

// True where every gradient that went into the matrix was finite: a NaN or an infinity in g_i reaches <g_i, g_i>,
// and an fp64 sum of squares of fp32 values cannot overflow (3e38^2 * 2^63 < 1e308).
GP_HD bool all_finite(const double* gram, int n) {
  bool finite = true;
  for (int i = 0; i < n; ++i) finite = finite && is_finite(gram[gram_index(n, i, i)]);
  return finite;
}

}  // namespace gradprom
