// SPDX-License-Identifier: Apache-2.0
// What compute capability 9.0 and later have: barriers in shared memory that count arrivals and bytes, copies of boxes of a
// tensor into shared memory that report to them, and clusters. Pasted between common.cuh and the files that need it.

struct alignas(64) TensorMap { long long words[16]; };

// One lane of a warp whose lanes are all here. The compiler knows that it is one: otherwise it would put a loop over the lanes
// around every copy.
__device__ __forceinline__ bool elect() {
    u32 elected;
    asm volatile("{\n\t.reg .pred p;\n\telect.sync _|p, 0xffffffff;\n\tselp.u32 %0, 1, 0, p;\n\t}" : "=r"(elected));
    return elected;
}

// ---- barriers and copies ----------------------------------------------------------------------------------------

__device__ __forceinline__ void init_barrier(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
__device__ __forceinline__ void expect_bytes(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// At the barrier in the same place of block `rank` of the cluster.
template <int BLOCKS>
__device__ __forceinline__ void arrive_at(u64* barrier, int rank) {
    if constexpr (BLOCKS == 1)
        arrive(barrier);
    else
        asm volatile(
            "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n"
            "\tmbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(shared_address(barrier)), "r"(rank) : "memory");
}
// Volatile, that is read anew: kept through a tile it would make those of 208 rows spill (tests/test_compile.py).
__device__ __forceinline__ int rank_in_cluster() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
__device__ __forceinline__ void sync_cluster() {
    arrive_at_cluster();
    wait_for_cluster();
}
// What is in the same place of block `rank` of the cluster.
__device__ __forceinline__ int load_of_block(const int* shared, int rank) {
    int x;
    asm volatile(
        "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %1, %2;\n\tld.shared::cluster.s32 %0, [there];\n\t}"
        : "=r"(x) : "r"(shared_address(shared)), "r"(rank) : "memory");
    return x;
}
__device__ __forceinline__ void wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n\t.reg .pred done;\n"
        "again:\n\tmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@!done bra again;\n\t}"
        ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}
// To the same place in block `rank` of the cluster; counts as its bytes at the barrier there.
__device__ __forceinline__ void send(int* to, int x, u64* barrier, int rank) {
    asm volatile(
        "{\n\t.reg .b32 there, report;\n"
        "\tmapa.shared::cluster.u32 there, %0, %3;\n\tmapa.shared::cluster.u32 report, %2, %3;\n"
        "\tst.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [there], %1, [report];\n\t}"
        ::"r"(shared_address(to)), "r"(x), "r"(shared_address(barrier)), "r"(rank) : "memory");
}
// What the L2 cache makes of a copy's lines, as createpolicy.fractional encodes it for all of them: they are the first to go, or
// the default.
[[maybe_unused]] constexpr u64 EVICT_FIRST = 0x12f0000000000000, EVICT_UNCHANGED = 0x10f0000000000000;
__device__ __forceinline__ void copy_weights(void* to, const TensorMap& map, int column, int group, int expert, u64* barrier,
                                             u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %4, %5, %6}], [%2], %7;"
        ::"r"(shared_address(to)), "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(0), "r"(group), "r"(expert),
          "l"(policy) : "memory");
}
// Has the map fetched before it is needed.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// To the same place in each block of the cluster, and to the barrier there.
template <int BLOCKS>
__device__ __forceinline__ void copy_rows(void* to, const TensorMap& map, int column, int row, u64* barrier) {
    if constexpr (BLOCKS == 1)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
            ::"r"(shared_address(to)), "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row) : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
            " [%0], [%1, {%3, %4}], [%2], %5;"
            ::"r"(shared_address(to)), "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row),
              "h"(u16((1 << BLOCKS) - 1)) : "memory");
}
