// GroupNorm(x + e) and SiLU, forwards and backwards, bf16, channels_last, one image at a time. AVX512-BF16.
#include <torch/extension.h>
#include <immintrin.h>
#include <vector>
#include <cmath>
using at::Tensor; using V = __m512;
typedef at::BFloat16 bf;
static inline V ld(const bf* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16)); }
static inline void st(bf* p, V v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
static inline V expv(V x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.f)), _mm512_set1_ps(87.f));
  V n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  V r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  V p = _mm512_set1_ps(1.f / 120);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 24)); p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f / 6));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f)); p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f)); p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, n);
}
static inline V rcp(V d) { V y = _mm512_rcp14_ps(d); return _mm512_mul_ps(y, _mm512_fnmadd_ps(d, y, _mm512_set1_ps(2.f))); }
static inline V sigm(V z) { return rcp(_mm512_add_ps(_mm512_set1_ps(1.f), expv(_mm512_sub_ps(_mm512_setzero_ps(), z)))); }

// x (N, HW, C) bf16; e (N, C) bf16 or empty; returns y, mean (N, G), rstd (N, G)
std::vector<Tensor> fwd(const Tensor& x, const Tensor& e, const Tensor& w, const Tensor& b, int64_t G, double eps, int64_t act) {
  int64_t N = x.size(0), P = x.size(1), C = x.size(2), D = C / G;
  Tensor y = at::empty_like(x), mean = at::empty({N, G}, w.options()), rstd = at::empty({N, G}, w.options());
  bool he = e.numel() > 0;
  const bf* xp = x.const_data_ptr<bf>(); const bf* ep = he ? e.const_data_ptr<bf>() : nullptr; bf* yp = y.data_ptr<bf>();
  const float *wp = w.const_data_ptr<float>(), *bp = b.const_data_ptr<float>();
  at::parallel_for(0, N, 1, [&](int64_t lo, int64_t hi) {
    alignas(64) float s[1024], q[1024], sc[1024], sh[1024], ee[1024];
    for (int64_t n = lo; n < hi; n++) {
      const bf* xi = xp + n * P * C; bf* yi = yp + n * P * C;
      for (int64_t c = 0; c < C; c++) ee[c] = he ? float(ep[n * C + c]) : 0.f;
      for (int64_t c = 0; c < C; c += 32) {
        V e0 = _mm512_load_ps(ee + c), e1 = _mm512_load_ps(ee + c + 16), z = _mm512_setzero_ps(), s0 = z, s1 = z, q0 = z, q1 = z;
        for (int64_t p = 0; p < P; p++) {
          V a = _mm512_add_ps(ld(xi + p * C + c), e0), d = _mm512_add_ps(ld(xi + p * C + c + 16), e1);
          s0 = _mm512_add_ps(s0, a); s1 = _mm512_add_ps(s1, d); q0 = _mm512_fmadd_ps(a, a, q0); q1 = _mm512_fmadd_ps(d, d, q1);
        }
        _mm512_store_ps(s + c, s0); _mm512_store_ps(s + c + 16, s1); _mm512_store_ps(q + c, q0); _mm512_store_ps(q + c + 16, q1);
      }
      for (int64_t g = 0; g < G; g++) {
        double S = 0, Q = 0; for (int64_t c = g * D; c < (g + 1) * D; c++) { S += s[c]; Q += q[c]; }
        double m = S / (D * P), v = std::max(Q / (D * P) - m * m, 0.0); float r = 1 / std::sqrt(v + eps);
        mean.data_ptr<float>()[n * G + g] = m; rstd.data_ptr<float>()[n * G + g] = r;
        for (int64_t c = g * D; c < (g + 1) * D; c++) { sc[c] = r * wp[c]; sh[c] = bp[c] + (ee[c] - float(m)) * sc[c]; }
      }
      for (int64_t c = 0; c < C; c += 32) {
        V a0 = _mm512_load_ps(sc + c), a1 = _mm512_load_ps(sc + c + 16), h0 = _mm512_load_ps(sh + c), h1 = _mm512_load_ps(sh + c + 16);
        for (int64_t p = 0; p < P; p++) {
          V z0 = _mm512_fmadd_ps(ld(xi + p * C + c), a0, h0), z1 = _mm512_fmadd_ps(ld(xi + p * C + c + 16), a1, h1);
          if (act == 1) { z0 = _mm512_mul_ps(z0, sigm(z0)); z1 = _mm512_mul_ps(z1, sigm(z1)); }
          else if (act == 2) { z0 = _mm512_max_ps(z0, _mm512_setzero_ps()); z1 = _mm512_max_ps(z1, _mm512_setzero_ps()); }
          st(yi + p * C + c, z0); st(yi + p * C + c + 16, z1);
        }
      }
    }
  });
  return {y, mean, rstd};
}

std::vector<Tensor> bwd(const Tensor& dy, const Tensor& x, const Tensor& e, const Tensor& w, const Tensor& b, const Tensor& mean, const Tensor& rstd, int64_t G, int64_t act) {
  int64_t N = x.size(0), P = x.size(1), C = x.size(2), D = C / G;
  bool he = e.numel() > 0;
  Tensor dx = at::empty_like(x), dw = at::zeros({N, C}, w.options()), db = at::zeros({N, C}, w.options()), de = he ? at::empty_like(e) : e;
  const bf *xp = x.const_data_ptr<bf>(), *dyp = dy.const_data_ptr<bf>(), *ep = he ? e.const_data_ptr<bf>() : nullptr; bf *dxp = dx.data_ptr<bf>(), *dep = he ? de.data_ptr<bf>() : nullptr;
  const float *wp = w.const_data_ptr<float>(), *bp = b.const_data_ptr<float>(), *mp = mean.const_data_ptr<float>(), *rp = rstd.const_data_ptr<float>();
  float *dwp = dw.data_ptr<float>(), *dbp = db.data_ptr<float>();
  at::parallel_for(0, N, 1, [&](int64_t lo, int64_t hi) {
    alignas(64) float s[1024], q[1024], sx[1024], sc[1024], sh[1024], ee[1024], kp[1024], kq[1024], kr[1024];
    std::vector<float> buf(P * C + 16); float* dz = (float*)(((uintptr_t)buf.data() + 63) & ~uintptr_t(63));
    for (int64_t n = lo; n < hi; n++) {
      const bf *xi = xp + n * P * C, *di = dyp + n * P * C; bf* oi = dxp + n * P * C;
      for (int64_t g = 0; g < G; g++) for (int64_t c = g * D; c < (g + 1) * D; c++) {
        ee[c] = he ? float(ep[n * C + c]) : 0.f; sc[c] = rp[n * G + g] * wp[c]; sh[c] = bp[c] + (ee[c] - mp[n * G + g]) * sc[c];
      }
      for (int64_t c = 0; c < C; c += 32) {
        V Z = _mm512_setzero_ps(), one = _mm512_set1_ps(1.f), s0 = Z, s1 = Z, q0 = Z, q1 = Z, x0 = Z, x1 = Z;
        V a0 = _mm512_load_ps(sc + c), a1 = _mm512_load_ps(sc + c + 16), h0 = _mm512_load_ps(sh + c), h1 = _mm512_load_ps(sh + c + 16);
        float* dc = dz + c * P;
        for (int64_t p = 0; p < P; p++) {
          V u0 = ld(xi + p * C + c), u1 = ld(xi + p * C + c + 16), d0 = ld(di + p * C + c), d1 = ld(di + p * C + c + 16);
          if (act == 1) {
            V z0 = _mm512_fmadd_ps(u0, a0, h0), z1 = _mm512_fmadd_ps(u1, a1, h1), g0 = sigm(z0), g1 = sigm(z1);
            d0 = _mm512_mul_ps(_mm512_mul_ps(d0, g0), _mm512_fmadd_ps(z0, _mm512_sub_ps(one, g0), one));
            d1 = _mm512_mul_ps(_mm512_mul_ps(d1, g1), _mm512_fmadd_ps(z1, _mm512_sub_ps(one, g1), one));
            _mm512_store_ps(dc + p * 32, d0); _mm512_store_ps(dc + p * 32 + 16, d1);
          }
          else if (act == 2) {
            V z0 = _mm512_fmadd_ps(u0, a0, h0), z1 = _mm512_fmadd_ps(u1, a1, h1);
            d0 = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z0, Z, _CMP_GT_OQ), d0); d1 = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z1, Z, _CMP_GT_OQ), d1);
            _mm512_store_ps(dc + p * 32, d0); _mm512_store_ps(dc + p * 32 + 16, d1);
          }
          s0 = _mm512_add_ps(s0, d0); s1 = _mm512_add_ps(s1, d1); q0 = _mm512_fmadd_ps(d0, u0, q0); q1 = _mm512_fmadd_ps(d1, u1, q1);
          if (he) { x0 = _mm512_add_ps(x0, u0); x1 = _mm512_add_ps(x1, u1); }
        }
        _mm512_store_ps(s + c, s0); _mm512_store_ps(s + c + 16, s1); _mm512_store_ps(q + c, q0); _mm512_store_ps(q + c + 16, q1);
        _mm512_store_ps(sx + c, x0); _mm512_store_ps(sx + c + 16, x1);
      }
      for (int64_t g = 0; g < G; g++) {
        float m = mp[n * G + g], r = rp[n * G + g]; double A = 0, B = 0, cnt = double(D) * P;
        for (int64_t c = g * D; c < (g + 1) * D; c++) {
          float xh = (q[c] + (ee[c] - m) * s[c]) * r;  // sum of dz * normalised
          dwp[n * C + c] = xh; dbp[n * C + c] = s[c]; A += wp[c] * s[c]; B += wp[c] * xh;
        }
        float k2 = -r * r * B / cnt, k3 = -r * A / cnt;
        for (int64_t c = g * D; c < (g + 1) * D; c++) {
          kp[c] = sc[c]; kq[c] = k2; kr[c] = k3 + k2 * (ee[c] - m);
          if (he) dep[n * C + c] = kp[c] * s[c] + kq[c] * sx[c] + kr[c] * P;
        }
      }
      for (int64_t c = 0; c < C; c += 32) {
        V p0 = _mm512_load_ps(kp + c), p1 = _mm512_load_ps(kp + c + 16), q0 = _mm512_load_ps(kq + c), q1 = _mm512_load_ps(kq + c + 16), r0 = _mm512_load_ps(kr + c), r1 = _mm512_load_ps(kr + c + 16);
        float* dc = dz + c * P;
        for (int64_t p = 0; p < P; p++) {
          V d0 = act ? _mm512_load_ps(dc + p * 32) : ld(di + p * C + c), d1 = act ? _mm512_load_ps(dc + p * 32 + 16) : ld(di + p * C + c + 16);
          V o0 = _mm512_fmadd_ps(p0, d0, _mm512_fmadd_ps(q0, ld(xi + p * C + c), r0)), o1 = _mm512_fmadd_ps(p1, d1, _mm512_fmadd_ps(q1, ld(xi + p * C + c + 16), r1));
          st(oi + p * C + c, o0); st(oi + p * C + c + 16, o1);
        }
      }
    }
  });
  return {dx, de, dw.sum(0), db.sum(0)};
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("fwd", &fwd); m.def("bwd", &bwd); }
