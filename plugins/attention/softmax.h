// exp and the running softmax over lanes of query rows. A part of kernel.h.
#pragma once

constexpr float kLowest = -3.402823466e38f;

inline Lanes::Reg minus_infinity() { return Lanes::set1(-__builtin_inff()); }

// exp(x) for x <= 0 to about one unit in the last place (Cephes' polynomial); results that would be subnormal are 0, and
// NaN stays NaN.
inline Lanes::Reg exp_lanes(Lanes::Reg x) {
  const auto limited = Lanes::max(Lanes::set1(-88.0f), x);
  const auto n = Lanes::round(Lanes::mul(limited, Lanes::set1(1.44269504088896341f)));
  auto r = Lanes::fma(n, Lanes::set1(-0.693359375f), limited);
  r = Lanes::fma(n, Lanes::set1(2.12194440e-4f), r);
  auto y = Lanes::set1(1.9875691500e-4f);
  y = Lanes::fma(y, r, Lanes::set1(1.3981999507e-3f));
  y = Lanes::fma(y, r, Lanes::set1(8.3334519073e-3f));
  y = Lanes::fma(y, r, Lanes::set1(4.1665795894e-2f));
  y = Lanes::fma(y, r, Lanes::set1(1.6666665459e-1f));
  y = Lanes::fma(y, r, Lanes::set1(5.0000001201e-1f));
  y = Lanes::add(Lanes::fma(Lanes::mul(y, r), r, r), Lanes::set1(1.0f));
  return Lanes::where_less(x, Lanes::set1(-87.3f), Lanes::zero(), Lanes::mul(y, Lanes::pow2(n)));
}

// What is subtracted from scores with the largest `max`: a row that has seen only -inf so far keeps weights of 0.
inline Lanes::Reg finite_base(Lanes::Reg max) {
  return Lanes::where_less(max, Lanes::set1(kLowest), Lanes::zero(), max);
}

// Scores s [n][lanes] of one register of rows become weights; largest, sum: the rows' state; visible: how many of the n
// tokens each row sees, or null for all. Returns by what earlier sums of the rows have to be multiplied.
inline Lanes::Reg softmax_step(float* s, int64_t n, int64_t stride, const float* visible, float* largest, float* sum) {
  auto top = Lanes::load(largest);
  if (visible) {
    const auto seen = Lanes::load(visible);
    for (int64_t t = 0; t < n; ++t) {
      const auto index = Lanes::set1(static_cast<float>(t));
      Lanes::store(s + t * stride, Lanes::where_less(index, seen, Lanes::load(s + t * stride), minus_infinity()));
    }
  }
  for (int64_t t = 0; t < n; ++t) top = Lanes::max(top, Lanes::load(s + t * stride));
  const auto base = finite_base(top);
  const auto keep = exp_lanes(Lanes::sub(Lanes::load(largest), base));
  auto total = Lanes::mul(Lanes::load(sum), keep);
  for (int64_t t = 0; t < n; ++t) {
    const auto weight = exp_lanes(Lanes::sub(Lanes::load(s + t * stride), base));
    total = Lanes::add(total, weight);
    Lanes::store(s + t * stride, weight);
  }
  Lanes::store(largest, top);
  Lanes::store(sum, total);
  return keep;
}
