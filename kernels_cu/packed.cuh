// SPDX-License-Identifier: Apache-2.0
// Many activated values on their way from GEMM 1 to requantize: float32 without the last eight bits, in an order that both
// write and read in whole lines.
//
// Rows of an expert are taken sixteen at a time, a group. Of a group, the threads of a warp that finish a tile have four rows
// each, by quarter: q, q + 1, q + 8 and q + 9 with q = 2 * quarter. Their values of one column take three words, the upper
// bytes of the first three with a byte of the fourth. A line of 128 bytes holds one of these words for eight columns and the
// four quarters:
//
//    group | eight columns | word 0, 1, 2 | quarter 0 .. 3 | column 0 .. 7

constexpr int GROUP_ROWS = 16, PACKED_WORDS = 3;

// A place of its own for each group: group `row / GROUP_ROWS + expert`, where expert's rows begin at any row.
__device__ __forceinline__ long long group_of(int row, int expert) { return row / GROUP_ROWS + expert; }

// Words from one group to the next, of `cols` columns.
__device__ __forceinline__ long long packed_pitch(long long cols) { return cols / 8 * (PACKED_WORDS * LANES); }

__device__ __forceinline__ void pack(const float (&v)[4], u32 (&words)[PACKED_WORDS]) {
    const u32 last = __float_as_uint(v[3]);
#pragma unroll
    for (int i = 0; i < PACKED_WORDS; ++i) words[i] = __byte_perm(__float_as_uint(v[i]), last, 0x3217 - i);
}

__device__ __forceinline__ void unpack(const u32 (&words)[PACKED_WORDS], float (&v)[4]) {
#pragma unroll
    for (int i = 0; i < PACKED_WORDS; ++i) v[i] = __uint_as_float(words[i] & 0xffffff00u);
    const u32 upper = __byte_perm(words[0], words[1], 0x0400);  // the lowest bytes of both, the first one's on top
    v[3] = __uint_as_float(__byte_perm(upper, words[2], 0x3240) & 0xffffff00u);
}
