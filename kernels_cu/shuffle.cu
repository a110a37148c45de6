// SPDX-License-Identifier: Apache-2.0
// shuffle_rows: out[row] = x[dst2src_map[row]], zeros where the map has no token. Serves scales (rows of one word) too.
//
// Constant put in front of this text:
//   Word        u8 | u16 | u32 | u64 | uint4: the widest that divides the row and fits the pointers

constexpr int IN_FLIGHT = 4;  // loads of a thread before its first store

// Each row is that of row_threads neighbouring threads, so that a block has one wide row or many narrow ones. Of a row
// wider than IN_FLIGHT words for each of them, blockIdx.y takes every gridDim.y-th stretch. The pointers are not
// __restrict__, so that no load moves behind a store.
// The rows are in stripes, which the blocks go through side by side. A token is read for each of its rows, and from memory once
// if these come at about the same time. The rows of an expert are in the order of the tokens: with a stripe to each expert, and
// about as many rows to each, they do. With more stripes it takes longer until a token's other rows come, with fewer only some of
// them come at that time. What is stored leaves the L2 cache first.
extern "C" __global__ void shuffle_rows(
    const Word* x,                            // (tokens, words)
    long long x_pitch,                        // words from one token to the next
    const int* dst2src_map,                   // (rows,)
    int tokens,
    int rows,
    int words,
    int row_threads,                          // divides the threads of a block
    int stripes,                              // divides the blocks along x
    Word* out)                                // (rows, words)
{
    wait_for_previous_kernel();
    const u32 block = blockIdx.x % u32(stripes) * (gridDim.x / u32(stripes)) + blockIdx.x / u32(stripes);
    const u32 row = block * (blockDim.x / u32(row_threads)) + threadIdx.x / u32(row_threads);
    if (row >= u32(rows)) return;
    const int token = dst2src_map[row];
    const bool valid = token >= 0 && token < tokens;
    const Word* source = x + (valid ? token : 0) * x_pitch;
    Word* target = out + (long long)row * words;

    const int stretch = row_threads * IN_FLIGHT;
    const long long first = (long long)blockIdx.y * stretch + threadIdx.x % u32(row_threads);
    for (long long start = first; start < words; start += (long long)gridDim.y * stretch) {
        Word word[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            const long long at = start + i * row_threads;
            word[i] = valid && at < words ? source[at] : Word{};
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            const long long at = start + i * row_threads;
            if (at < words) __stcs(target + at, word[i]);
        }
    }
}
