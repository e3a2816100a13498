// The products of kernels.h, written once over the names of simd_*.h and compiled for each instruction set.
#include "native/weights.h"

// Columns that are widened to floats at once: 32 kB for two panels, which the first-level cache holds.
constexpr size_t EXPAND_COLUMNS = 256;
constexpr size_t PREFETCH_BYTES = 1536;

// One panel times R rows, each as if it were alone.
template <Scheme S, int R>
inline void panel_times_rows(const Matrix& m, size_t panel, const float* x, size_t stride, Floats (&totals)[R]) {
  const uint8_t* codes = m.panel(panel) + m.scale_bytes;
  for (int r = 0; r < R; ++r) totals[r] = zero();
  size_t k = 0;
  for (size_t group = 0; k < m.padded_columns; ++group) {
    // four sums hide the latency of the additions
    Floats sums[R][4];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < 4; ++i) sums[r][i] = zero();
    for (const size_t end = end_of_group(m, group); k < end; k += 8, codes += bytes_of_eight(S)) {
      for (size_t line = 0; line < bytes_of_eight(S); line += 64) __builtin_prefetch(codes + PREFETCH_BYTES + line);
      Floats w[8];
      eight<S>(codes, w);
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 8; ++i) sums[r][i % 4] = fma(broadcast(x[r * stride + k + i]), w[i], sums[r][i % 4]);
    }
    for (int r = 0; r < R; ++r) {
      const Floats sum = add(add(sums[r][0], sums[r][1]), add(sums[r][2], sums[r][3]));
      if constexpr (quantized(S)) totals[r] = fma(sum, scale_of(m, panel, group), totals[r]);
      else totals[r] = sum;
    }
  }
}

// Columns k … end of a panel as floats, 16 a column, a column every `width` floats.
template <Scheme S>
inline void expand(const Matrix& m, size_t panel, size_t k, size_t end, float* out, size_t width) {
  const uint8_t* codes = m.panel(panel) + m.scale_bytes + k / 8 * bytes_of_eight(S);
  size_t group = quantized(S) && m.groups > 1 ? k / m.group_columns : 0;
  while (k < end) {
    const size_t group_end = end_of_group(m, group), stop = group_end < end ? group_end : end;
    const Floats scale = quantized(S) ? scale_of(m, panel, group) : zero();
    for (; k < stop; k += 8, codes += bytes_of_eight(S)) {
      Floats w[8];
      eight<S>(codes, w);
      for (int i = 0; i < 8; ++i, out += width) store(out, quantized(S) ? mul(w[i], scale) : w[i]);
    }
    ++group;
  }
}

// R rows times P panels over `depth` columns, added to what lies in out, or in its place.
template <int R, int P>
inline void tile(const float* x, size_t stride, size_t depth, const float* w, Output out, bool add_to) {
  Floats sums[R][P];
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) sums[r][p] = add_to ? load(out.data + r * out.stride + p * PANEL_ROWS) : zero();
  for (size_t k = 0; k < depth; ++k, w += P * PANEL_ROWS) {
    Floats columns[P];
    for (int p = 0; p < P; ++p) columns[p] = load(w + p * PANEL_ROWS);
    for (int r = 0; r < R; ++r) {
      const Floats value = broadcast(x[r * stride + k]);
      for (int p = 0; p < P; ++p) sums[r][p] = fma(value, columns[p], sums[r][p]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) store(out.data + r * out.stride + p * PANEL_ROWS, sums[r][p]);
}

// Calls body with the largest of the given counts that is left, as a constant, until all rows are done.
template <int R, int... Smaller, typename Body>
inline void by_tiles(size_t row, size_t rows, const Body& body) {
  for (; rows - row >= size_t(R); row += R) body(row, Constant<R>{});
  if constexpr (sizeof...(Smaller) > 0) by_tiles<Smaller...>(row, rows, body);
}

template <typename Body>
inline void by_exact_tiles(size_t rows, const Body& body) {
  if constexpr (TILE_ROWS == 12) by_tiles<12, 8, 4, 2, 1>(0, rows, body);
  else if constexpr (TILE_ROWS == 6) by_tiles<6, 4, 2, 1>(0, rows, body);
  else by_tiles<4, 2, 1>(0, rows, body);
}

template <Scheme S, int P>
inline void exact_panels(const Matrix& m, size_t panel, const float* x, size_t stride, size_t rows, Output out) {
  alignas(64) float w[EXPAND_COLUMNS * P * PANEL_ROWS];
  for (size_t k = 0; k < m.padded_columns; k += EXPAND_COLUMNS) {
    const size_t end = k + EXPAND_COLUMNS < m.padded_columns ? k + EXPAND_COLUMNS : m.padded_columns;
    for (int p = 0; p < P; ++p) expand<S>(m, panel + p, k, end, w + p * PANEL_ROWS, P * PANEL_ROWS);
    by_exact_tiles(rows, [&](size_t row, auto count) {
      const Output place{out.data + row * out.stride, out.stride};
      tile<decltype(count)::value, P>(x + row * stride + k, stride, end - k, w, place, k > 0);
    });
  }
}

template <Scheme S>
inline void few_rows(const Matrix& m, Panels panels, const float* x, size_t stride, size_t rows, Output out) {
  for (size_t panel = 0; panel < panels.count; ++panel) {
    const auto body = [&](size_t row, auto count) {
      Floats totals[decltype(count)::value];
      panel_times_rows<S, decltype(count)::value>(m, panels.first + panel, x + row * stride, stride, totals);
      for (int r = 0; r < decltype(count)::value; ++r) store(out.data + (row + r) * out.stride + panel * PANEL_ROWS, totals[r]);
    };
    if constexpr (TILE_ROWS == 12) by_tiles<4, 2, 1>(0, rows, body);
    else by_tiles<1>(0, rows, body);
  }
}

template <Scheme S>
inline void exact_as(const Matrix& m, Panels panels, const float* x, size_t stride, size_t rows, Output out) {
  if (rows <= FEW_ROWS) return few_rows<S>(m, panels, x, stride, rows, out);
  size_t done = 0;
  for (; done + TILE_PANELS <= panels.count; done += TILE_PANELS)
    exact_panels<S, TILE_PANELS>(m, panels.first + done, x, stride, rows, {out.data + done * PANEL_ROWS, out.stride});
  for (; done < panels.count; ++done)
    exact_panels<S, 1>(m, panels.first + done, x, stride, rows, {out.data + done * PANEL_ROWS, out.stride});
}

void exact(const Matrix& m, Panels panels, const float* x, size_t stride, size_t rows, Output out) {
  switch (m.scheme) {
    case Scheme::int4: return exact_as<Scheme::int4>(m, panels, x, stride, rows, out);
    case Scheme::int8: return exact_as<Scheme::int8>(m, panels, x, stride, rows, out);
    case Scheme::fp16: return exact_as<Scheme::fp16>(m, panels, x, stride, rows, out);
    case Scheme::bf16: return exact_as<Scheme::bf16>(m, panels, x, stride, rows, out);
  }
}

// Where P panels begin, `apart` bytes from each other, and R rows, `stride` codes from each other.
struct Operands {
  const uint8_t* codes;
  size_t apart;
  const int8_t* x;
  size_t stride;
};

// Adds the products of R rows with one chunk of P panels.
template <Scheme S, int R, int P>
inline void chunk_dots(Operands at, Dots (&sums)[R][P]) {
  for (size_t k = 0; k < CHUNK; k += S == Scheme::int4 ? 8 : 4, at.codes += 64) {
    Codes raw[P], codes[P];
    for (int p = 0; p < P; ++p) {
      __builtin_prefetch(at.codes + p * at.apart + PREFETCH_BYTES);
      raw[p] = load_codes(at.codes + p * at.apart);
      codes[p] = S == Scheme::int4 ? low(raw[p]) : bytes(raw[p]);
    }
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) sums[r][p] = dot(sums[r][p], codes[p], at.x + r * at.stride + k);
    if constexpr (S == Scheme::int4) {
      for (int p = 0; p < P; ++p) codes[p] = high(raw[p]);
      for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) sums[r][p] = dot(sums[r][p], codes[p], at.x + r * at.stride + k + 4);
    }
  }
}

template <Scheme S, int R, int P>
inline void rounded_sums(const Matrix& m, size_t panel, const Activations& a, size_t row, Floats (&totals)[R][P]) {
  Operands at{m.panel(panel) + m.scale_bytes, m.panel_bytes, a.codes + row * a.columns, a.columns};
  const float* scales = a.scales + row * a.chunks;
  const int32_t* offsets = (S == Scheme::int4 ? a.offset4 : a.offset8) + row * a.chunks;
  constexpr bool SHIFTED = S == Scheme::int4 || !SIGNED_CODES;
  const bool one_scale = m.groups == 1;
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) totals[r][p] = zero();
  Floats group_scales[P];
  size_t chunk = 0;
  for (size_t group = 0; chunk < a.chunks; ++group) {
    for (int p = 0; p < P; ++p) group_scales[p] = scale_of(m, panel + p, group);
    for (const size_t end = end_of_group(m, group) / CHUNK; chunk < end; ++chunk) {
      Dots sums[R][P];
      for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) sums[r][p] = first_dots(SHIFTED ? offsets[r * a.chunks + chunk] : 0);
      chunk_dots<S, R, P>(at, sums);
      at.codes += CHUNK / 8 * bytes_of_eight(S), at.x += CHUNK;
      for (int r = 0; r < R; ++r) {
        const Floats scale = broadcast(scales[r * a.chunks + chunk]);
        for (int p = 0; p < P; ++p) {
          const Floats sum = finish(sums[r][p], SHIFTED ? offsets[r * a.chunks + chunk] : 0);
          totals[r][p] = one_scale ? fma(sum, scale, totals[r][p]) : fma(mul(sum, scale), group_scales[p], totals[r][p]);
        }
      }
    }
  }
  // one scale a row: behind all sums
  if (!one_scale) return;
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) totals[r][p] = mul(totals[r][p], group_scales[p]);
}

template <Scheme S, int R, int P>
inline void fast_panels(const Matrix& m, size_t panel, const Activations& a, size_t row, Output out) {
  Floats totals[R][P];
  rounded_sums<S, R, P>(m, panel, a, row, totals);
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < P; ++p) store(out.data + r * out.stride + p * PANEL_ROWS, totals[r][p]);
}

template <Scheme S, int R>
inline void split_panel(const Matrix& m, size_t panel, const Activations& a, size_t row, Output out) {
  Floats totals[R * SPLIT_ROWS][1];
  rounded_sums<S, R * SPLIT_ROWS, 1>(m, panel, a, row * SPLIT_ROWS, totals);
  for (int r = 0; r < R; ++r) {
    const auto* parts = totals + r * SPLIT_ROWS;
    // the smallest part first
    store(out.data + r * out.stride, add(parts[0][0], add(parts[1][0], parts[2][0])));
  }
}

template <Scheme S>
inline void split_as(const Matrix& m, Panels panels, const Activations& a, size_t first_row, size_t rows, Output out) {
  for (size_t panel = 0; panel < panels.count; ++panel) {
    const auto body = [&](size_t row, auto count) {
      const Output place{out.data + row * out.stride + panel * PANEL_ROWS, out.stride};
      split_panel<S, decltype(count)::value>(m, panels.first + panel, a, first_row + row, place);
    };
    if constexpr (FAST_ROWS == 8) by_tiles<2, 1>(0, rows, body);
    else by_tiles<1>(0, rows, body);
  }
}

template <Scheme S>
inline void fast_panel(const Matrix& m, size_t panel, const Activations& a, size_t first_row, size_t rows, Output out) {
  const auto body = [&](size_t row, auto count) {
    fast_panels<S, decltype(count)::value, 1>(m, panel, a, first_row + row, {out.data + row * out.stride, out.stride});
  };
  if constexpr (FAST_ROWS == 8) by_tiles<8, 4, 2, 1>(0, rows, body);
  else if constexpr (FAST_ROWS == 4) by_tiles<4, 2, 1>(0, rows, body);
  else by_tiles<2, 1>(0, rows, body);
}

template <Scheme S>
inline void fast_as(const Matrix& m, Panels panels, const Activations& a, size_t first_row, size_t rows, Output out) {
  size_t panel = 0;
  // two panels share each number that is spread over a register; what 6 rows leave is taken one panel at a time
  if constexpr (FAST_PANELS == 2)
    if (rows > FEW_ROWS)
      for (; panel + 2 <= panels.count; panel += 2) {
        Output place{out.data + panel * PANEL_ROWS, out.stride};
        const size_t whole = rows / 6 * 6, first = panels.first + panel;
        for (size_t row = 0; row < whole; row += 6, place.data += 6 * out.stride)
          fast_panels<S, 6, 2>(m, first, a, first_row + row, place);
        fast_panel<S>(m, first, a, first_row + whole, rows - whole, place);
        fast_panel<S>(m, first + 1, a, first_row + whole, rows - whole, {place.data + PANEL_ROWS, out.stride});
      }
  for (; panel < panels.count; ++panel)
    fast_panel<S>(m, panels.first + panel, a, first_row, rows, {out.data + panel * PANEL_ROWS, out.stride});
}

void fast(const Matrix& m, Panels panels, const Activations& a, size_t first_row, size_t rows, Output out) {
  if constexpr ((FAST_SCHEMES >> int(Scheme::int4) & 1) != 0)
    if (m.scheme == Scheme::int4) return fast_as<Scheme::int4>(m, panels, a, first_row, rows, out);
  if constexpr ((FAST_SCHEMES >> int(Scheme::int8) & 1) != 0) fast_as<Scheme::int8>(m, panels, a, first_row, rows, out);
}

void split_rows(const Matrix& m, Panels panels, const Activations& a, size_t first_row, size_t rows, Output out) {
  if constexpr ((FAST_SCHEMES >> int(Scheme::int4) & 1) != 0)
    if (m.scheme == Scheme::int4) return split_as<Scheme::int4>(m, panels, a, first_row, rows, out);
  if constexpr ((FAST_SCHEMES >> int(Scheme::int8) & 1) != 0) split_as<Scheme::int8>(m, panels, a, first_row, rows, out);
}
