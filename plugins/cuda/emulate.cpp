// The machine of emulation.h and the calls that emulate.py makes. Not thread-safe: one emulation a process.
#include "device.cuh"

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

namespace emulation {
Dim3 thread, block, block_size, grid_size;
unsigned char* shared;

namespace {
enum class State { ready, warp, barrier, done };
struct Copy { void* to; const void* from; int valid, bytes, group; };
struct Fiber {
  ucontext_t context;
  jmp_buf at;
  bool started = false;
  State state = State::done;
  Dim3 index;
  int operation = 0, parity = 0, groups = 0;
  std::vector<Copy> copies;
};
constexpr size_t STACK = 128 << 10, PAGE = 4096;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
unsigned char* stacks;
Fiber* current;
int self;
jmp_buf scheduler;
sigjmp_buf failure;
char message[512];
void (*body)(void**);
void** arguments;
const char* kernel_name;

void run_forever() {
  for (;;) {
    body(arguments);
    current->state = State::done;
    if (!_setjmp(current->at)) _longjmp(scheduler, 1);
  }
}

void wait_as(State state) {
  current->state = state;
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

void resume(int i) {
  current = &fibers[i];
  self = i;
  thread = current->index;
  if (_setjmp(scheduler)) return;
  if (current->started) _longjmp(current->at, 1);
  current->started = true;
  getcontext(&current->context);
  current->context.uc_stack.ss_sp = stacks + i * STACK;
  current->context.uc_stack.ss_size = STACK;
  current->context.uc_link = nullptr;
  makecontext(&current->context, run_forever, 0);
  setcontext(&current->context);
}

// Runs a warp until none of its lanes can go on; all lanes must meet in the same operation.
void run_warp(int first, int count, int order) {
  for (;;) {
    for (int i = 0; i < count; i++) {
      int one = first + (order & 1 ? count - 1 - i : i);
      if (fibers[one].state == State::ready) resume(one);
    }
    int waiting = 0;
    for (int i = first; i < first + count; i++) waiting += fibers[i].state == State::warp;
    if (waiting == 0) return;
    if (waiting != count || count != WARP) fail("a warp operation that not all 32 lanes reach");
    for (int i = first; i < first + count; i++) {
      if (fibers[i].operation != fibers[first].operation) fail("lanes of a warp in different operations");
      fibers[i].state = State::ready;
    }
  }
}

void run_block(int threads, int order) {
  for (int i = 0; i < threads; i++) {
    fibers[i].state = State::ready;
    fibers[i].copies.clear();
    fibers[i].index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
  }
  for (;;) {
    int groups = (threads + WARP - 1) / WARP, barrier = 0, done = 0;
    for (int i = 0; i < groups; i++) {
      int warp = order & 2 ? groups - 1 - i : i;
      run_warp(warp * WARP, std::min(WARP, threads - warp * WARP), order);
    }
    for (int i = 0; i < threads; i++) {
      barrier += fibers[i].state == State::barrier;
      done += fibers[i].state == State::done;
    }
    if (done == threads) break;
    if (barrier != threads) fail("__syncthreads that not all threads reach");
    for (int i = 0; i < threads; i++) fibers[i].state = State::ready;
  }
  for (int i = 0; i < threads; i++)
    if (!fibers[i].copies.empty()) fail("a copy that nobody waited for");
}

void on_fault(int, siginfo_t* info, void*) {
  std::snprintf(message, sizeof message, "%s: access outside a buffer at %p, block (%u, %u, %u), thread %d", kernel_name,
                info->si_addr, block.x, block.y, block.z, self);
  siglongjmp(failure, 1);
}

struct Table {
  float values[65536];
  Table() {
    for (unsigned h = 0; h < 65536; h++) {
      unsigned exponent = h >> 10 & 31, fraction = h & 1023;
      double v = exponent ? std::ldexp(1024 + fraction, static_cast<int>(exponent) - 25) : std::ldexp(fraction, -24);
      if (exponent == 31) v = fraction ? NAN : INFINITY;
      values[h] = static_cast<float>(h >> 15 ? -v : v);
    }
  }
} const table;

std::map<std::string, void (*)(void**)>& kernels() {
  static std::map<std::string, void (*)(void**)> known;
  return known;
}
}  // namespace

float half_to_float(uint16_t h) { return table.values[h]; }

uint16_t float_to_half(double f) {
  uint64_t bits;
  std::memcpy(&bits, &f, 8);
  const auto sign = static_cast<uint16_t>(bits >> 48 & 0x8000);
  const int exponent = static_cast<int>(bits >> 52 & 2047) - 1023;
  uint64_t fraction = bits & ((1ull << 52) - 1);
  if (exponent == 1024) return fraction ? 0x7fff : sign | 0x7c00;
  if (exponent > 15) return sign | 0x7c00;
  if (exponent < -26) return sign;
  // Below 2^-14 the last place stays 2^-24, so more of the fraction goes; the carry of rounding goes into the exponent.
  const int dropped = exponent >= -14 ? 42 : 42 + (-14 - exponent);
  const uint64_t whole = exponent >= -14 ? fraction | static_cast<uint64_t>(exponent + 15) << 52 : fraction | 1ull << 52;
  const uint64_t half = 1ull << (dropped - 1), rest = whole & ((1ull << dropped) - 1);
  uint64_t rounded = whole >> dropped;
  rounded += rest > half || (rest == half && (rounded & 1));
  return sign | static_cast<uint16_t>(rounded);
}

void fail(const char* what) {
  std::snprintf(message, sizeof message, "%s: %s, block (%u, %u, %u), thread %d", kernel_name, what, block.x, block.y, block.z,
                self);
  siglongjmp(failure, 1);
}

void block_barrier() { wait_as(State::barrier); }
int lane() { return self % WARP; }

unsigned char (*exchange(int operation, const void* mine, int bytes))[PAYLOAD] {
  Warp& warp = warps[self / WARP];
  int parity = current->parity ^= 1;
  if (bytes) std::memcpy(warp.slots[parity][lane()], mine, bytes);
  current->operation = operation;
  wait_as(State::warp);
  return warp.slots[parity];
}

void copy_later(void* to, const void* from, int valid, int bytes) {
  if (valid < 0 || valid > bytes) fail("cp.async of an impossible number of bytes");
  current->copies.push_back({to, from, valid, bytes, current->groups});
}
void commit_copies() { current->groups++; }
void wait_copies(int pending) {
  std::vector<Copy> later;
  for (const Copy& c : current->copies) {
    if (c.group >= current->groups - pending) { later.push_back(c); continue; }
    std::memset(c.to, 0, c.bytes);
    std::memcpy(c.to, c.from, c.valid);
  }
  current->copies.swap(later);
}

Registration::Registration(const char* name, void (*call)(void**)) { kernels()[name] = call; }
}  // namespace emulation

using emulation::exchange;
using emulation::lane;

void mma(float (&c)[4], const half2_t (&a)[4], const half2_t (&b)[2]) {
  half2_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  auto slots = exchange(3, mine, sizeof mine);
  int row = lane() / 4, column = lane() % 4 * 2;
  auto half_of = [&](int from, int word, int part) {
    half_t h;
    std::memcpy(&h, slots[from] + word * 4 + part * 2, 2);
    return static_cast<double>(emulation::half_to_float(h));
  };
  for (int i = 0; i < 4; i++) {
    double sum = 0;
    for (int k = 0; k < 16; k++) {
      int quad = k % 8 / 2, upper = k / 8;
      sum += half_of(row * 4 + quad, upper * 2 + i / 2, k % 2) * half_of((column + i % 2) * 4 + quad, 4 + upper, k % 2);
    }
    c[i] = static_cast<float>(c[i] + sum);
  }
}

void load_transposed(half2_t (&d)[4], const void* row) {
  uint4 mine = *emulation::aligned<uint4>(row);
  auto slots = exchange(5, &mine, sizeof mine);
  for (int i = 0; i < 4; i++) {
    half_t parts[2];
    for (int j = 0; j < 2; j++) std::memcpy(&parts[j], slots[i * 8 + lane() % 4 * 2 + j] + lane() / 4 * 2, 2);
    d[i] = parts[0] | static_cast<half2_t>(parts[1]) << 16;
  }
}

extern "C" {
// Memory between two pages that cannot be touched, its end at the second one; filled with 0xff, a NaN of every width.
void* guarded_allocate(size_t bytes) {
  using namespace emulation;
  size_t room = (bytes + PAGE - 1) / PAGE * PAGE;
  auto* base = static_cast<unsigned char*>(mmap(nullptr, room + 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (base == MAP_FAILED) return nullptr;
  std::memset(base + PAGE, 0xff, room);
  mprotect(base, PAGE, PROT_NONE);
  mprotect(base + PAGE + room, PAGE, PROT_NONE);
  return base + PAGE + room - (bytes + 15) / 16 * 16;
}
void guarded_free(void* p, size_t bytes) {
  using namespace emulation;
  size_t room = (bytes + PAGE - 1) / PAGE * PAGE;
  munmap(static_cast<unsigned char*>(p) + (bytes + 15) / 16 * 16 - room - PAGE, room + 2 * PAGE);
}

// order: bit 0 turns the lanes of a warp round, bit 1 the warps, bit 2 the blocks. Returns null or what went wrong.
const char* emulate(const char* name, const unsigned* grid, const unsigned* threads, unsigned shared_bytes, void** args, int order) {
  using namespace emulation;
  kernel_name = name;
  auto found = kernels().find(name);
  if (found == kernels().end()) return "no such kernel";
  size_t count = size_t{threads[0]} * threads[1] * threads[2];
  if (count == 0 || count > 1024) return "impossible block";
  if (!stacks) stacks = static_cast<unsigned char*>(mmap(nullptr, STACK * 1024, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  fibers = std::vector<Fiber>(count);
  warps.resize((count + WARP - 1) / WARP);
  body = found->second, arguments = args;
  grid_size = {grid[0], grid[1], grid[2]}, block_size = {threads[0], threads[1], threads[2]};
  shared = static_cast<unsigned char*>(guarded_allocate(shared_bytes));
  struct sigaction action = {}, before;
  action.sa_sigaction = on_fault, action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before);
  const char* wrong = nullptr;
  if (sigsetjmp(failure, 1)) {
    wrong = message;
  } else {
    size_t blocks = size_t{grid[0]} * grid[1] * grid[2];
    for (size_t i = 0; i < blocks; i++) {
      size_t b = order & 4 ? blocks - 1 - i : i;
      block = {static_cast<unsigned>(b % grid[0]), static_cast<unsigned>(b / grid[0] % grid[1]),
               static_cast<unsigned>(b / (size_t{grid[0]} * grid[1]))};
      std::memset(shared, 0xff, shared_bytes);
      run_block(static_cast<int>(count), order);
    }
  }
  sigaction(SIGSEGV, &before, nullptr);
  guarded_free(shared, shared_bytes);
  return wrong;
}
}
