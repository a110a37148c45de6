// SPDX-License-Identifier: Apache-2.0
// shuffle_rows: out[row] = x[dst2src_map[row]], zeros where the map has no token. Serves scales (rows of one word) too.
//
// Constant put in front of this text:
//   Word        u8 | u16 | u32 | u64 | uint4: the widest that divides the row and fits the pointers

extern "C" __global__ void shuffle_rows(
    const Word* __restrict__ x,               // (tokens, words)
    long long x_pitch,                        // words from one token to the next
    const int* __restrict__ dst2src_map,      // (rows,)
    int tokens,
    int rows,
    int words,
    Word* __restrict__ out)                   // (rows, words)
{
    wait_for_previous_kernel();
    const long long total = (long long)rows * words;
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
        const int row = int(i / words);
        const int token = dst2src_map[row];
        const bool valid = token >= 0 && token < tokens;
        out[i] = valid ? x[token * x_pitch + (i - (long long)row * words)] : Word{};
    }
}
