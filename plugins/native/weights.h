// The bytes of a matrix (layout.py) as vectors, written once over the names of simd_*.h.

constexpr size_t bytes_of_eight(Scheme scheme) {
  return scheme == Scheme::int4 ? 64 : scheme == Scheme::int8 ? 128 : 256;
}
constexpr bool quantized(Scheme scheme) { return scheme == Scheme::int4 || scheme == Scheme::int8; }

// Eight columns of a panel as floats, codes without their scale.
template <Scheme S>
inline void eight(const uint8_t* p, Floats (&w)[8]) {
  if constexpr (S == Scheme::int4) {
    const Codes codes = load_codes(p);
    w[0] = int4_at<0>(codes), w[1] = int4_at<1>(codes), w[2] = int4_at<2>(codes), w[3] = int4_at<3>(codes);
    w[4] = int4_at<4>(codes), w[5] = int4_at<5>(codes), w[6] = int4_at<6>(codes), w[7] = int4_at<7>(codes);
  } else if constexpr (S == Scheme::int8) {
    const Codes first = load_codes(p), second = load_codes(p + 64);
    w[0] = int8_at<0>(first), w[1] = int8_at<1>(first), w[2] = int8_at<2>(first), w[3] = int8_at<3>(first);
    w[4] = int8_at<0>(second), w[5] = int8_at<1>(second), w[6] = int8_at<2>(second), w[7] = int8_at<3>(second);
  } else {
    for (int i = 0; i < 8; ++i) w[i] = S == Scheme::fp16 ? load_halves(p + 32 * i) : load_bfloats(p + 32 * i);
  }
}

inline Floats scale_of(const Matrix& m, size_t panel, size_t group) {
  const uint8_t* scales = m.panel(panel);
  if (m.wide_scales) return load(reinterpret_cast<const float*>(scales) + group * PANEL_ROWS);
  return load_halves(scales + group * PANEL_ROWS * 2);
}

inline size_t end_of_group(const Matrix& m, size_t group) {
  return group + 1 >= m.groups ? m.padded_columns : (group + 1) * m.group_columns;
}
