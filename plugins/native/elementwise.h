// What stands between two products: rounding of activations, SwiGLU, weighted sums; over the names of simd_*.h.

// e^x for x in −104 … 104, relative error below 2e-7; beyond: 0 and infinity, NaN stays. Taylor's series on |r| ≤ ln 2 / 2.
inline Floats exponential(Floats x) {
  const Floats bounded = clamp(x, -104.0f, 104.0f);
  const Floats n = round(mul(bounded, broadcast(1.44269504f)));
  // ln 2 in two parts: the first has few enough bits that n times it is exact
  Floats r = fma(n, broadcast(-0.693359375f), bounded);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Floats sum = broadcast(1.0f / 5040);
  for (float divisor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f}) sum = fma(sum, r, broadcast(divisor));
  return scale_by_power(sum, n);
}

inline Floats silu(Floats x) {
  return div(x, add(broadcast(1.0f), exponential(mul(x, broadcast(-1.0f)))));
}

void swiglu(const float* pairs, size_t stride, size_t rows, size_t pair_count, Output out) {
  for (size_t row = 0; row < rows; ++row)
    for (size_t pair = 0; pair < pair_count; ++pair) {
      const float* gate = pairs + row * stride + pair * 2 * PANEL_ROWS;
      store(out.data + row * out.stride + pair * PANEL_ROWS, mul(silu(load(gate)), load(gate + PANEL_ROWS)));
    }
}

void accumulate(float* y, const float* x, float weight, size_t count) {
  for (size_t i = 0; i < count; i += PANEL_ROWS) store(y + i, fma(broadcast(weight), load(x + i), load(y + i)));
}

// Smaller numbers become 0: 127 divided by them would overflow.
constexpr float SMALLEST = 1e-30f;

inline void quantize_chunk(const float* x, int8_t* codes, float& scale, int32_t& sum) {
  const Floats first = load(x), second = load(x + 16);
  // 0 · x is NaN for NaN and infinity
  const bool finite = !has_nan(fma(first, zero(), mul(second, zero())));
  const float low = largest(first), high = largest(second), most = low > high ? low : high;
  const float inverse = finite && most > SMALLEST ? 127.0f / most : 0.0f;
  scale = !finite ? __builtin_nanf("") : inverse == 0.0f ? 0.0f : most / 127.0f;
  store_rounded(codes, finite ? mul(first, broadcast(inverse)) : zero());
  store_rounded(codes + 16, finite ? mul(second, broadcast(inverse)) : zero());
  sum = 0;
  for (size_t i = 0; i < CHUNK; ++i) sum += codes[i];
}

inline void quantize_into(const float* x, const Activations& a, size_t row, size_t chunk) {
  const size_t place = row * a.chunks + chunk;
  int32_t sum = 0;
  quantize_chunk(x, a.codes + row * a.columns + chunk * CHUNK, a.scales[place], sum);
  a.offset4[place] = -8 * sum;
  a.offset8[place] = -128 * sum;
}

// A chunk of x, filled with zeros behind `columns`.
inline void copy_chunk(const float* x, size_t columns, size_t chunk, float* out) {
  const size_t at = chunk * CHUNK, count = columns - at < CHUNK ? columns - at : CHUNK;
  for (size_t i = 0; i < CHUNK; ++i) out[i] = i < count ? x[at + i] : 0.0f;
}

void quantize(const float* x, size_t columns, const Activations& a, size_t row) {
  for (size_t chunk = 0; chunk < a.chunks; ++chunk) {
    float tail[CHUNK];
    const bool whole = (chunk + 1) * CHUNK <= columns;
    if (!whole) copy_chunk(x, columns, chunk, tail);
    quantize_into(whole ? x + chunk * CHUNK : tail, a, row, chunk);
  }
}

void split(const float* x, size_t columns, const Activations& a, size_t place) {
  for (size_t chunk = 0; chunk < a.chunks; ++chunk) {
    float rest[CHUNK];
    copy_chunk(x, columns, chunk, rest);
    for (size_t row = place * SPLIT_ROWS; row < (place + 1) * SPLIT_ROWS; ++row) {
      quantize_into(rest, a, row, chunk);
      const float scale = a.scales[row * a.chunks + chunk];
      const int8_t* codes = a.codes + row * a.columns + chunk * CHUNK;
      for (size_t i = 0; i < CHUNK; ++i) rest[i] = __builtin_fmaf(-float(codes[i]), scale, rest[i]);
    }
  }
}
