/* Enough of CUDA to run the kernels' sources on a CPU: a fiber per thread, scheduled in random order.
 *
 * It finds missing barriers (shared memory is poisoned for every block, and any thread may run far ahead of the others),
 * reads and writes out of bounds, and barriers that some thread never reaches. It knows nothing of memory models, speed or
 * registers.
 */
#pragma once
#define SIMULATED
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <random>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define PTR(type) Checked<type>
#define SHARED(type, name, n) \
    static type name[n];      \
    sim::poison(name, sizeof(name))
#define NARROWED(T, row, v) narrowed<T>(row, v)

using std::isinf;

struct uint4 { uint32_t x, y, z, w; };
struct Index { unsigned x; };
static Index threadIdx, blockIdx;

namespace sim {
enum State { READY, AT_BARRIER, AT_WARP, DONE };
static const int N = 256, STACK = 1 << 16;
static ucontext_t scheduler, fiber[N];
static std::vector<char> stacks((size_t)N * STACK);
static State state[N];
static unsigned char slot[2][N][16];
static int operations[N], current;
static std::function<void()> body;
static std::map<void *, long> poisoned;
static long epoch;
static std::mt19937 order;
static const void *watched; /* an array, and how often each of its elements was loaded or stored */
static int64_t *touched;

[[noreturn]] inline void fail(const char *what) {
    fprintf(stderr, "simulator: %s (block %u, thread %d)\n", what, blockIdx.x, current);
    abort();
}

inline void poison(void *memory, size_t bytes) {
    long &seen = poisoned[memory];
    if (seen != epoch) memset(memory, 0xff, bytes);
    seen = epoch;
}

inline void wait(State why) {
    state[current] = why;
    swapcontext(&fiber[current], &scheduler);
}

inline void run_fiber() {
    body();
    state[current] = DONE;
    swapcontext(&fiber[current], &scheduler);
}

inline int count(int first, int last, State s) {
    int n = 0;
    for (int t = first; t < last; t++) n += state[t] == s;
    return n;
}

inline void release() {
    for (int w = 0; w < N; w += 32)
        if (count(w, w + 32, AT_WARP) == 32)
            for (int t = w; t < w + 32; t++) state[t] = READY;
    if (count(0, N, AT_BARRIER) == N)
        for (int t = 0; t < N; t++) state[t] = READY;
}

inline void run_block() {
    epoch++;
    for (int t = 0; t < N; t++) {
        state[t] = READY;
        getcontext(&fiber[t]);
        fiber[t].uc_stack.ss_sp = stacks.data() + (size_t)t * STACK;
        fiber[t].uc_stack.ss_size = STACK;
        fiber[t].uc_link = &scheduler;
        makecontext(&fiber[t], run_fiber, 0);
    }
    while (count(0, N, DONE) < N) {
        std::vector<int> ready;
        release();
        for (int t = 0; t < N; t++)
            if (state[t] == READY) ready.push_back(t);
        if (ready.empty()) fail("some threads wait where others never come");
        std::shuffle(ready.begin(), ready.end(), order);
        for (int t : ready) {
            threadIdx.x = current = t;
            swapcontext(&scheduler, &fiber[t]);
        }
    }
}

inline void launch(int64_t blocks, unsigned seed, std::function<void()> kernel) {
    body = kernel;
    order.seed(seed);
    for (int64_t b = 0; b < blocks; b++) {
        blockIdx.x = (unsigned)b;
        run_block();
    }
}

/* Put a value down, wait for the warp, hand over everyone's values. */
template <class T> inline std::vector<T> meet(T value) {
    int buffer = operations[current]++ & 1, first = current / 32 * 32;
    memcpy(slot[buffer][current], &value, sizeof(T));
    wait(AT_WARP);
    std::vector<T> all(32);
    for (int lane = 0; lane < 32; lane++) memcpy(&all[lane], slot[buffer][first + lane], sizeof(T));
    return all;
}
} // namespace sim

inline void __syncthreads() { sim::wait(sim::AT_BARRIER); }
template <class T> inline T __shfl_xor_sync(unsigned, T v, int mask) {
    int lane = threadIdx.x % 32;
    return sim::meet(v)[lane ^ mask];
}
template <class T> inline T __shfl_up_sync(unsigned, T v, int step) {
    int lane = threadIdx.x % 32;
    return sim::meet(v)[lane < step ? lane : lane - step];
}
template <class T> inline T __shfl_sync(unsigned, T v, int from) { return sim::meet(v)[from]; }
inline uint32_t __ballot_sync(unsigned, int predicate) {
    uint32_t bits = 0;
    auto all = sim::meet(predicate);
    for (int lane = 0; lane < 32; lane++) bits |= (uint32_t)(all[lane] != 0) << lane;
    return bits;
}
inline int __ffs(uint32_t bits) { return __builtin_ffs((int)bits); }
inline int __clz(int bits) { return bits ? __builtin_clz((unsigned)bits) : 32; }
template <class T> inline void atomicAdd(T *at, T value) { *at += value; }
inline float __uint_as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }
inline float half_to_float(uint16_t h) { _Float16 x; memcpy(&x, &h, 2); return (float)x; }
inline uint16_t float_to_half(float f) { _Float16 x = (_Float16)f; uint16_t h; memcpy(&h, &x, 2); return h; }

/* A pointer that knows how many elements lie behind its origin. */
template <class T> struct Checked {
    T *origin;
    int64_t offset, size;
    T &operator[](int64_t i) const {
        if (offset + i < 0 || offset + i >= size) sim::fail("index out of bounds");
        if (origin == sim::watched) sim::touched[offset + i]++;
        return origin[offset + i];
    }
    Checked operator+(int64_t n) const { return {origin, offset + n, size}; }
    explicit operator bool() const { return origin != nullptr; }
};
template <class T> inline bool is_aligned16(Checked<T> p) { return ((uintptr_t)(p.origin + p.offset) & 15) == 0; }
template <class T> inline uint4 load16(Checked<T> p) {
    uint4 raw;
    if (!is_aligned16(p)) sim::fail("16-byte load from an unaligned address");
    for (size_t j = 0; j < 16 / sizeof(T); j++) p[(int64_t)j];
    memcpy(&raw, p.origin + p.offset, 16);
    return raw;
}
template <class T> inline T &narrowed(Checked<float> row, int64_t v) {
    row[v * (int64_t)sizeof(T) / 4];
    return ((T *)(row.origin + row.offset))[v];
}
