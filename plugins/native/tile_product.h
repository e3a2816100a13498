// The product of tiles: 32 rows by 32 weight rows in four tile registers, over 256 columns of 64 weight rows at a time, whose
// expansion the first-level cache holds.

constexpr size_t DEPTH = 8;  // tiles of 32 columns
constexpr size_t PANELS = TILE_PANELS_WIDE;
constexpr size_t SUM_FLOATS = TILE_ROWS_MOST * PANEL_ROWS;

// What a call works on: weights of DEPTH · 32 columns, their scales, and the sums of all its rows.
struct alignas(64) Workspace {
  uint8_t weights[DEPTH][2][PANELS][TILE_BYTES];  // […, term, …]
  float scales[DEPTH][PANELS][PANEL_ROWS];
  float sums[TILE_BLOCK / TILE_ROWS_MOST][PANELS][SUM_FLOATS];
  float group[4][SUM_FLOATS];
};

struct Stretch {
  size_t block, count;  // of 32 columns
  bool first;
};

template <Scheme S, Form F>
inline void expand_panels(const Matrix& m, Panels panels, const Stretch& stretch, Workspace& space) {
  for (size_t block = 0; block < stretch.count; ++block)
    for (size_t p = 0; p < PANELS; ++p) {
      uint8_t* to = space.weights[block][0][p];
      const size_t k = (stretch.block + block) * CHUNK;
      if (p >= panels.count) {
        __builtin_memset(to, 0, TILE_BYTES), __builtin_memset(space.weights[block][1][p], 0, TILE_BYTES);
        continue;
      }
      expand_tile<S, F>(m, panels.first + p, k, to, sizeof(space.weights[0][0]));
      if constexpr (quantized(S) && F == Form::plain) {
        const size_t group = k / m.group_columns;
        store(space.scales[block][p], scale_of(m, panels.first + p, group < m.groups ? group : m.groups - 1));
      }
    }
}

// One tile of R row tiles, `rows` bytes apart, times the two panels in registers 6 and 7.
template <int R>
inline void dot_tiles(const uint8_t* x, size_t apart) {
  tile_load<4>(x);
  tile_dot_bf16<0, 4, 6>();
  tile_dot_bf16<1, 4, 7>();
  if constexpr (R == 2) {
    tile_load<5>(x + apart);
    tile_dot_bf16<2, 5, 6>();
    tile_dot_bf16<3, 5, 7>();
  }
}

// Terms of x times terms of weights; the products of the smallest ones are below 2⁻²⁴.
template <int R, int X, int W>
inline void dot_block(const uint8_t* x, size_t apart, const uint8_t* weights) {
  for (int w = 0; w < W; ++w) {
    tile_load<6>(weights + size_t(w) * PANELS * TILE_BYTES);
    tile_load<7>(weights + size_t(w) * PANELS * TILE_BYTES + TILE_BYTES);
    for (int term = 0; term < X - w; ++term) dot_tiles<R>(x + size_t(term) * TILE_BYTES, apart);
  }
}

template <int R>
inline void zero_sums() {
  tile_zero<0>(), tile_zero<1>();
  if constexpr (R == 2) tile_zero<2>(), tile_zero<3>();
}
// The sums of R row tiles and two panels, rows PANELS tiles apart.
template <int R>
inline void load_sums(const float* sums) {
  tile_load<0>(sums), tile_load<1>(sums + SUM_FLOATS);
  if constexpr (R == 2) tile_load<2>(sums + PANELS * SUM_FLOATS), tile_load<3>(sums + (PANELS + 1) * SUM_FLOATS);
}
template <int R>
inline void store_sums(float* sums, size_t apart) {
  tile_store<0>(sums), tile_store<1>(sums + SUM_FLOATS);
  if constexpr (R == 2) tile_store<2>(sums + apart), tile_store<3>(sums + apart + SUM_FLOATS);
}

// sums (+)= scale · group
template <int R>
inline void add_group(const float* group, const float* scales, float* sums, bool first) {
  for (int tile = 0; tile < 2 * R; ++tile) {
    const Floats scale = load(scales + tile % 2 * PANEL_ROWS);
    float* to = sums + (tile / 2 * PANELS + tile % 2) * SUM_FLOATS;
    const float* from = group + tile * SUM_FLOATS;
    for (size_t i = 0; i < SUM_FLOATS; i += PANEL_ROWS)
      store(to + i, first ? mul(load(from + i), scale) : fma(load(from + i), scale, load(to + i)));
  }
}

// R row tiles of activations, `apart` bytes from each other, and where their sums lie.
struct Place {
  const uint8_t* x;
  size_t apart;
  float* sums;
};

// R row tiles times two panels over a stretch of columns. group_blocks: 0 where no scale stands between columns.
template <int R, int X, int W>
inline void stretch_product(const Place& place, const Stretch& stretch, size_t half, size_t group_blocks, Workspace& space) {
  const uint8_t* x = place.x + stretch.block * X * TILE_BYTES;
  if (stretch.first || group_blocks > 0) zero_sums<R>();
  else load_sums<R>(place.sums);
  bool first = stretch.first;
  for (size_t block = 0; block < stretch.count; ++block, x += X * TILE_BYTES) {
    dot_block<R, X, W>(x, place.apart, space.weights[block][0][2 * half]);
    if (group_blocks == 0 || (block + 1 < stretch.count && (stretch.block + block + 1) % group_blocks != 0)) continue;
    store_sums<R>(space.group[0], 2 * SUM_FLOATS);
    zero_sums<R>();
    add_group<R>(space.group[0], space.scales[block][2 * half], place.sums, first);
    first = false;
  }
  if (group_blocks == 0) store_sums<R>(place.sums, PANELS * SUM_FLOATS);
}

struct Job {
  const Matrix& m;
  const TileRows& rows;
  size_t first_row, count, group_blocks;
};

// Four panels; their last stretch leaves the whole sums in the workspace.
template <Scheme S, Form F, int X>
inline void panels_product(const Job& job, Panels panels, Workspace& space) {
  constexpr int W = F == Form::terms ? 2 : 1;
  const size_t tiles = (job.count + TILE_ROWS_MOST - 1) / TILE_ROWS_MOST, apart = job.rows.blocks * X * TILE_BYTES;
  const uint8_t* x = reinterpret_cast<const uint8_t*>(job.rows.data) + job.first_row / TILE_ROWS_MOST * apart;
  for (size_t block = 0; block < job.rows.blocks; block += DEPTH) {
    const size_t left = job.rows.blocks - block;
    const Stretch stretch{block, left < DEPTH ? left : DEPTH, block == 0};
    expand_panels<S, F>(job.m, panels, stretch, space);
    for (size_t tile = 0; tile < tiles; tile += 2)
      for (size_t half = 0; 2 * half < panels.count; ++half) {
        const Place place{x + tile * apart, apart, space.sums[tile][2 * half]};
        if (tile + 1 < tiles) stretch_product<2, X, W>(place, stretch, half, job.group_blocks, space);
        else stretch_product<1, X, W>(place, stretch, half, job.group_blocks, space);
      }
  }
}

// The sums as rows of the output; with one scale a row it is only now that they get it.
inline void write_out(const Workspace& space, const Matrix& m, Panels panels, size_t rows, bool scaled, Output out) {
  Floats scales[PANELS];
  for (size_t p = 0; p < PANELS; ++p)
    scales[p] = scaled && p < panels.count ? scale_of(m, panels.first + p, 0) : broadcast(1.0f);
  // a row's panels together: they share cache lines' neighbours and a page
  for (size_t row = 0; row < rows; ++row)
    for (size_t p = 0; p < panels.count; ++p) {
      const float* from = &space.sums[row / TILE_ROWS_MOST][p][row % TILE_ROWS_MOST * PANEL_ROWS];
      store(out.data + row * out.stride + p * PANEL_ROWS, mul(load(from), scales[p]));
    }
}

template <Scheme S, Form F, int X>
void multiply_as(const Job& job, Panels panels, Output out) {
  tiles_begin();
  Workspace space;
  const bool one_scale = quantized(S) && F == Form::plain && job.m.groups == 1;
  for (size_t done = 0; done < panels.count; done += PANELS) {
    const size_t left = panels.count - done;
    const Panels some{panels.first + done, left < PANELS ? left : PANELS};
    panels_product<S, F, X>(job, some, space);
    write_out(space, job.m, some, job.count, one_scale, {out.data + done * PANEL_ROWS, out.stride});
  }
  tiles_end();
}

template <Scheme S>
inline void multiply_quantized(const Job& job, Panels panels, Output out) {
  if (job.rows.terms > 1) return multiply_as<S, Form::plain, EXACT_TERMS>(job, panels, out);
  if (job.m.groups > 1) return multiply_as<S, Form::rounded, 1>(job, panels, out);
  multiply_as<S, Form::plain, 1>(job, panels, out);
}

void multiply(const Matrix& m, Panels panels, const TileRows& rows, size_t first_row, size_t count, Output out) {
  const bool exact = rows.terms > 1;
  const Job job{m, rows, first_row, count, exact && m.groups > 1 ? m.group_columns / CHUNK : 0};
  switch (m.scheme) {
    case Scheme::int4: return multiply_quantized<Scheme::int4>(job, panels, out);
    case Scheme::int8: return multiply_quantized<Scheme::int8>(job, panels, out);
    case Scheme::fp16:
      if (exact) return multiply_as<Scheme::fp16, Form::terms, EXACT_TERMS>(job, panels, out);
      return multiply_as<Scheme::fp16, Form::rounded, 1>(job, panels, out);
    case Scheme::bf16:
      if (exact) return multiply_as<Scheme::bf16, Form::plain, EXACT_TERMS>(job, panels, out);
      return multiply_as<Scheme::bf16, Form::plain, 1>(job, panels, out);
  }
}
