// 3x3 convolutions with stride 1 and padding 1 by Winograd's F(2x2, 3x3) (Lavin and Gray, arXiv:1509.09308): forwards, and both gradients.
// bf16, channels_last, fp32 sums; AVX512-BF16. Channels are multiples of 32, height and width even.
#include <torch/extension.h>
#include <immintrin.h>
#include <vector>
using at::Tensor; using V = __m512; typedef at::BFloat16 bf; typedef uint16_t u16;
static inline V ld(const bf* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)); }
static inline void st(bf* p, V v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
static inline V add(V a, V b) { return _mm512_add_ps(a, b); }
static inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
static const int TB = 64;  // tiles to a block

struct Shape { int64_t N, H, W, C, TY, TX; };

// column x of tile row ty: B^T applied to the four pixels above one another
static inline void column(const bf* xi, const Shape& s, int64_t ty, int64_t x, V o[4]) {
  V d[4];
  for (int r = 0; r < 4; r++) {
    int64_t y = 2 * ty - 1 + r;
    d[r] = (x < 0 || x >= s.W || y < 0 || y >= s.H) ? _mm512_setzero_ps() : ld(xi + (y * s.W + x) * s.C);
  }
  o[0] = sub(d[0], d[2]); o[1] = add(d[1], d[2]); o[2] = sub(d[2], d[1]); o[3] = sub(d[1], d[3]);
}

// tiles [t0, t1) of x (N, H, W, C) -> v. pairs over channels: v[k][t][C]; pairs over tiles: v[k][t / 2][C][2]
template <bool over_tiles> static void transform_in(const bf* x, const Shape& s, int64_t t0, int64_t t1, bf* v) {
  const int64_t T = s.TY * s.TX, C = s.C, plane = TB * C + 32;
  alignas(64) u16 order[32];
  for (int i = 0; i < 16; i++) { order[2 * i] = i; order[2 * i + 1] = 16 + i; }
  const __m512i inter = _mm512_load_si512(order);
  for (int64_t t = t0; t < t1;) {
    int64_t n = t / T, ty = t % T / s.TX, tx0 = t % s.TX, tx1 = std::min(s.TX, tx0 + (t1 - t));
    for (int64_t c = 0; c < C; c += 16) {
      const bf* xi = x + n * s.H * s.W * C + c;
      V a[4], b[4], e[4], f[4], even[16];
      column(xi, s, ty, 2 * tx0 - 1, a); column(xi, s, ty, 2 * tx0, b);
      for (int64_t tx = tx0; tx < tx1; tx++) {
        column(xi, s, ty, 2 * tx + 1, e); column(xi, s, ty, 2 * tx + 2, f);
        int64_t i = t - t0 + tx - tx0;
        V o[16];
        for (int r = 0; r < 4; r++) { o[4 * r] = sub(a[r], e[r]); o[4 * r + 1] = add(b[r], e[r]); o[4 * r + 2] = sub(e[r], b[r]); o[4 * r + 3] = sub(b[r], f[r]); }
        for (int r = 0; r < 4; r++) { a[r] = e[r]; b[r] = f[r]; }
        if (!over_tiles) for (int k = 0; k < 16; k++) st(v + k * plane + i * C + c, o[k]);
        else if (i % 2 == 0) for (int k = 0; k < 16; k++) even[k] = o[k];
        else for (int k = 0; k < 16; k++)
          _mm512_storeu_si512(v + k * plane + (i / 2) * 2 * C + 2 * c, _mm512_permutexvar_epi16(inter, (__m512i)_mm512_cvtne2ps_pbh(o[k], even[k])));
      }
    }
    t += tx1 - tx0;
  }
}

// A dY A^T, in pairs over tiles: z[k][t / 2][C][2]; db (C) += the sum of dY
static void transform_grad(const bf* dy, const Shape& s, int64_t t0, int64_t t1, bf* z, float* db) {
  const int64_t T = s.TY * s.TX, C = s.C, plane = TB * C + 32;
  alignas(64) u16 order[32];
  for (int i = 0; i < 16; i++) { order[2 * i] = i; order[2 * i + 1] = 16 + i; }
  const __m512i inter = _mm512_load_si512(order);
  for (int64_t t = t0; t < t1; t += 2) {
    int64_t n = t / T, ty = t % T / s.TX, tx = t % s.TX, i = t - t0;
    for (int64_t c = 0; c < C; c += 16) {
      V o[2][16];
      for (int h = 0; h < 2; h++) {
        const bf* p = dy + ((n * s.H + 2 * ty) * s.W + 2 * (tx + h)) * C + c;
        V y[2][2] = {{ld(p), ld(p + C)}, {ld(p + s.W * C), ld(p + s.W * C + C)}}, q[4][2];
        for (int w = 0; w < 2; w++) { q[0][w] = y[0][w]; q[1][w] = add(y[0][w], y[1][w]); q[2][w] = sub(y[0][w], y[1][w]); q[3][w] = sub(_mm512_setzero_ps(), y[1][w]); }
        for (int r = 0; r < 4; r++) { o[h][4 * r] = q[r][0]; o[h][4 * r + 1] = add(q[r][0], q[r][1]); o[h][4 * r + 2] = sub(q[r][0], q[r][1]); o[h][4 * r + 3] = sub(_mm512_setzero_ps(), q[r][1]); }
      }
      _mm512_storeu_ps(db + c, add(_mm512_loadu_ps(db + c), add(o[0][5], o[1][5])));
      for (int k = 0; k < 16; k++)
        _mm512_storeu_si512(z + k * plane + (i / 2) * 2 * C + 2 * c, _mm512_permutexvar_epi16(inter, (__m512i)_mm512_cvtne2ps_pbh(o[1][k], o[0][k])));
    }
  }
}

// M (8, 32) = or += sum over pairs of a (rows: step ra, pairs: step ka, in ints) and b (pairs: step kb; 32 ints in a row)
template <bool acc> static inline void kernel(const int* a, int64_t ra, int64_t ka, const int* b, int64_t kb, int64_t K, float* m, int64_t rm) {
  V s[8][2];
  for (int r = 0; r < 8; r++) for (int h = 0; h < 2; h++) s[r][h] = acc ? _mm512_loadu_ps(m + r * rm + 16 * h) : _mm512_setzero_ps();
  for (int64_t k = 0; k < K; k++) {
    __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * kb), b1 = (__m512bh)_mm512_loadu_si512(b + k * kb + 16);
    #pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
      __m512bh w = (__m512bh)_mm512_set1_epi32(a[r * ra + k * ka]);
      s[r][0] = _mm512_dpbf16_ps(s[r][0], b0, w); s[r][1] = _mm512_dpbf16_ps(s[r][1], b1, w);
    }
  }
  for (int r = 0; r < 8; r++) for (int h = 0; h < 2; h++) _mm512_storeu_ps(m + r * rm + 16 * h, s[r][h]);
}

static Shape shape(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3), x.size(1) / 2, x.size(2) / 2}; }

// x (N, H, W, C) bf16; u (16, C / 2, D, 2) bf16; bias (D) fp32 or empty -> (N, H, W, D) bf16
Tensor conv(const Tensor& x, const Tensor& u, const Tensor& bias) {
  Shape s = shape(x); const int64_t C = s.C, D = u.size(2), T = s.TY * s.TX, all = s.N * T, blocks = (all + TB - 1) / TB;
  Tensor y = at::empty({s.N, s.H, s.W, D}, x.options());
  const bf* xp = x.const_data_ptr<bf>(); bf* yp = y.data_ptr<bf>(); const int* up = (const int*)u.const_data_ptr<bf>();
  std::vector<float> zero(D, 0.f); const float* bp = bias.numel() ? bias.const_data_ptr<float>() : zero.data();
  at::parallel_for(0, blocks, 1, [&](int64_t lo, int64_t hi) {
    std::vector<bf> v(16 * (TB * C + 32)); std::vector<float> m(16 * (TB * D + 16));
    for (int64_t blk = lo; blk < hi; blk++) {
      int64_t t0 = blk * TB, t1 = std::min(all, t0 + TB);
      transform_in<false>(xp, s, t0, t1, v.data());
      for (int k = 0; k < 16; k++) for (int64_t d = 0; d < D; d += 32) for (int64_t t = 0; t < t1 - t0; t += 8)
        kernel<false>((const int*)(v.data() + k * (TB * C + 32) + t * C), C / 2, 1, up + k * C / 2 * D + d, D, C / 2, m.data() + k * (TB * D + 16) + t * D + d, D);
      for (int64_t t = t0; t < t1; t++) {
        int64_t n = t / T, ty = t % T / s.TX, tx = t % s.TX;
        for (int64_t d = 0; d < D; d += 16) {
          V q[2][4], bb = _mm512_loadu_ps(bp + d);
          for (int w = 0; w < 4; w++) {
            V g[4]; for (int r = 0; r < 4; r++) g[r] = _mm512_loadu_ps(m.data() + (4 * r + w) * (TB * D + 16) + (t - t0) * D + d);
            q[0][w] = add(add(g[0], g[1]), g[2]); q[1][w] = sub(sub(g[1], g[2]), g[3]);
          }
          for (int r = 0; r < 2; r++) {
            bf* o = yp + ((n * s.H + 2 * ty + r) * s.W + 2 * tx) * D + d;
            st(o, add(bb, add(add(q[r][0], q[r][1]), q[r][2]))); st(o + D, add(bb, sub(sub(q[r][1], q[r][2]), q[r][3])));
          }
        }
      }
    }
  });
  return y;
}

// x (N, H, W, C), dy (N, H, W, D) bf16 -> the gradients of u (16, C, D) and of the bias (D), fp32
std::vector<Tensor> wgrad(const Tensor& x, const Tensor& dy) {
  Shape s = shape(x), sd = shape(dy); const int64_t C = s.C, D = sd.C, T = s.TY * s.TX, all = s.N * T, blocks = (all + TB - 1) / TB;
  Tensor du = at::zeros({16, C, D}, x.options().dtype(at::kFloat)), db = at::zeros({D}, du.options());
  const bf *xp = x.const_data_ptr<bf>(), *dp = dy.const_data_ptr<bf>(); float *up = du.data_ptr<float>(), *bp = db.data_ptr<float>();
  std::vector<bf> v(16 * (TB * C + 32)), z(16 * (TB * D + 32));
  for (int64_t blk = 0; blk < blocks; blk++) {
    int64_t t0 = blk * TB, t1 = std::min(all, t0 + TB);
    transform_in<true>(xp, s, t0, t1, v.data()); transform_grad(dp, sd, t0, t1, z.data(), bp);
    for (int k = 0; k < 16; k++) for (int64_t d = 0; d < D; d += 32) for (int64_t c = 0; c < C; c += 8)
      kernel<true>((const int*)(v.data() + k * (TB * C + 32)) + c, 1, C, (const int*)(z.data() + k * (TB * D + 32)) + d, D, (t1 - t0) / 2, up + (k * C + c) * D + d, D);
  }
  return {du, db};
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("conv", &conv); m.def("wgrad", &wgrad); }
