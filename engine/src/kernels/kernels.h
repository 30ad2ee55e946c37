// What a kernel is: the one contract every ISA row fulfils.
//
// All kernels work on vectors of 16 channels ("blocks"), so that a plan and its packed constants do not depend on the
// ISA. A vector load or store may reach past the last channel up to the end of its block; every buffer has slack for
// that. Float arithmetic: each multiply and each add is rounded to float32 on its own, nearest-even, in the
// order written here. No kernel saturates or overflows: the builder has proved that the real weights keep every int32
// sum inside its range.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lowbit {

inline constexpr int kLanes = 16;   // channels in a block
inline constexpr int kSlack = 256;  // bytes that may be read or overwritten behind the end of any buffer

// How a value lies in memory. All are pixel-major, channels last.
enum class Rep : uint8_t {
  kBits,      // 1-bit codes, the higher one -> bit 1; channels filled up with 0 bits to whole 32-bit words
  kHalfBits,  // the same for at most 16 channels, filled up to 16 bits
  kS16,       // integer codes, zero point subtracted
  kI32,
  kF32,
  kF16,
  kU8,  // integer codes or pixels plus what makes 0 of the lowest one
};

// --- 1-bit x 1-bit convolution of one run of output pixels of one row ---
// acc = base[pixel][filter] - 2 * popcount(activation xor weight), summed over all taps; padded taps hold 0 bits and
// `base` has them corrected. Weights are [tap word][block][16 filters].
struct Epilogue;

struct BitConv {
  const void* a;          // the first pixel's first tap
  const ptrdiff_t* taps;  // where each tap word lies from there, in words
  int depth;              // number of tap words
  bool rows_of_3;         // they are 3 rows of 3 words side by side
  ptrdiff_t pixel_step;   // in words
  int pixels;
  const uint32_t* w;
  int blocks;  // 1..4 blocks of 16 filters
  // 2 or 4 blocks, and `w` is [tap word][nibble, the lowest first][32 or 64 filters] bytes: of each 32 filters, byte 2
  // i is that of filter i and byte 2 i + 1 that of filter 16 + i. The sums fit 16 bits.
  bool nibbles;
  // Per pixel constants: `table + offset[pixel]` is one int32 per filter: the base, or what the popcount has to stay
  // below, negative.
  const int32_t* table;
  const int32_t* offset;
  // bit_threshold: bit = table + popcount < 0. Writes (blocks + 1) / 2 words a pixel.
  char* bits;
  ptrdiff_t bits_step;  // bytes
  bool half_bits;       // at most 16 filters: 16 bits a pixel are written, not 32
  // bit_steps: the epilogue on acc, which is in no memory: `src` is not read. Its first block is that of `w`.
  const Epilogue* epilogue;
};

// half_threshold, half_steps: the same for at most 16 channels, kHalfBits: words are half as long, and each is in a
// 32-bit word of `w` twice, once for each of two neighbouring pixels, as are the numbers of half_threshold's table.
// pixel_step is 1.

// --- matrix product: out[pixel][block * 16 + lane] = sum over r, k of a[pixel][r][k] * w[block][r][k][lane] ---
// int_gemm: a is int16, k runs over pairs, w is int16 [block][r][pair][16][2], out is int32.
// byte_gemm: a is uint8, k runs over groups of 4, w is int8 [block][r][group][16][4], out is int32 and begins at
// `start`. float_gemm: a, w [block][r][k][16] and out are float32; strictly sequential over r and k from +0, product
// rounded, then sum rounded.
struct Gemm {
  const void* a;
  ptrdiff_t a_step;  // elements from pixel to pixel
  int pixels;
  int rows;            // of a window; their numbers lie side by side
  ptrdiff_t row_step;  // elements from row to row
  int depth;           // of a row: number of pairs, of groups of 4, or of floats
  const void* w;
  ptrdiff_t w_block;  // elements from block to block
  int blocks;
  const int32_t* start;  // byte_gemm: one per filter
  // Where the results go: through an epilogue, as for bit_steps, or without one to `out`.
  const Epilogue* epilogue;
  void* out;
  ptrdiff_t out_step;  // elements from pixel to pixel
};

// --- weights of 1 or 2 bits by small codes, by tables ---
// A table is 64 bytes: for six neighbouring channels of a pixel, the sum of the bytes of every subset of them. Six
// weight bits of a filter pick one, and one instruction looks up 64 filters.
constexpr int kTableChannels = 6, kTableBytes = 64, kTableFilters = 64;

struct Tables {
  const uint8_t* src;    // the first pixel's channels
  ptrdiff_t pixel_step;  // bytes
  int pixels;
  int channels;
  int groups;       // of six channels, the last one filled up
  uint8_t* tables;  // [pixel][group][64]
  int32_t* sums;    // of each pixel's channels
};

// sum = 2^shift * (sum over planes k and all taps and groups of 2^k * what the filter's six bits pick) + each * the
// sums of the pixels in the window. Some groups at a time: what is not the last of them leaves `partial` for the next.
// Without levels: acc[pixel][filter] = sum + start[filter]; with `more`, what is in `acc` takes the place of the
// pixels' sums and start. Byte 2 i of `w` is that of filter i, byte 2 i + 1 that of filter 32 + i. With levels:
// codes[pixel][filter] = the number of limits that (sum xor flip) is at least; it fits 16 bits. The bytes of `w` are in
// the order of the filters, limits and flips those of the even ones first.
struct TableConv {
  const uint8_t* const* rows;  // of a window: the tables of the first pixel's first tap
  int row_count;
  int taps;  // of a row: 1 or 3
  ptrdiff_t tap_step;
  int first_group, groups;
  bool begins, ends;     // they are the first ones, the last ones
  void* partial;         // 128 bytes for each pixel and set or plane
  int together;          // sums of so many lookups fit a byte: 2, or those of some groups; all of them fit 16 bits
  ptrdiff_t pixel_step;  // bytes
  int pixels;            // at most 16
  const uint8_t* w;      // [row][group][tap][plane][64]
  ptrdiff_t w_row_step;
  int planes;  // 1 or 2; with 2, one set
  int sets;    // 1 or 2 sets of 64 filters
  ptrdiff_t set_step;
  int shift;
  bool more;
  // The sums of pixels: of each row that the window reaches, from the first pixel's first tap on. May be read up to 15
  // numbers beyond the last pixel's.
  const int32_t* const* sums;
  int sum_rows, sum_taps;
  ptrdiff_t sum_tap_step, sum_step;  // from tap to tap, from pixel to pixel
  int32_t each;
  const int32_t* start;
  int32_t* acc;  // [pixel][set * 64 + filter]
  ptrdiff_t acc_step;
  int levels;
  const int16_t* limits;  // [set][level][64]
  const int16_t* flip;    // [set][64]: 0 or -1
  uint8_t* codes;
  ptrdiff_t codes_step;  // bytes
  int filters;           // codes to be stored of a pixel
};

// --- float convolution to a few filters: 16 neighbouring pixels are a vector ---
// planes: the channels of `pixels` pixels of a row apart, as float32: plane[channel * plane_step + pixel]. Whole
// vectors are written.
struct Planes {
  const void* src;  // channel 0 of the first pixel
  Rep rep;          // kS16, kF32, kF16
  ptrdiff_t pixel_step;
  int pixels, channels;
  float* dst;
  ptrdiff_t plane_step;
};

// out[pixel * out_step + filter] = sum over r, c, k of rows[r][k * plane_step + pixel + c * tap_step] *
// w[r][c][k][filter], strictly sequential from +0, product rounded, then sum rounded. With out_step 1, of one filter,
// whole vectors are written.
inline constexpr int kLineFilters = 4;  // at once: w is [set of so many filters][r][c][k][filter of the set]

struct LineConv {
  const float* const* rows;  // plane 0 under the first pixel's first tap
  int row_count, columns, channels;
  ptrdiff_t tap_step, plane_step;
  const float* w;
  ptrdiff_t set_step, first;  // numbers of a set, and of each of its filters those of the rows before rows[0]
  int filters, pixels;
  float* out;
  ptrdiff_t out_step;
};

// --- im2col: the patches under `pixels` output positions of one row, in the order (kernel row, kernel column, channel)
// --- Source kS16 -> int16 or float32; kF32, kF16 -> float32. Padded positions become 0. `dst_step` >= rows * cols *
// channels; elements between that and `fill` are set to 0.
struct Patches {
  const void* src;  // channel 0 of the group at (0, 0)
  Rep rep;
  bool to_float;
  int height, width;
  ptrdiff_t pixel_step, row_step;  // elements
  int channels, rows, cols;
  int stride_x, dilation_y, dilation_x;
  int y, x;  // input position of the first pixel's first tap; may be negative
  int pixels;
  void* dst;
  ptrdiff_t dst_step;
  int fill;
};

// --- a window of input positions under one output position, lanes = channels ---
// depthwise: sum of value * weight, row-major from 0. kS16 sources with `integer` give int32 (weights int32), all
// others float32. sum_pool: row-major float32 sum from +0, times `scale`. max_pool: best = x > best ? x : best,
// row-major from the first.
struct Window {
  const void* src;
  Rep rep;  // kS16, kF32, kF16
  int rows, cols;
  ptrdiff_t row_step, col_step;  // elements of the source
  int blocks;
  const void* w;  // depthwise: int32 or float32
  ptrdiff_t w_row_step, w_col_step;
  bool integer;
  float scale;
  void* out;  // int32 or float32, blocks * 16
};

// --- the sums of codes: sum[pixel][group] = the codes of the group's channels, for `pixels` pixels of one row ---
// kBits: a group owns whole words, unless it is the only one.
struct CodeSums {
  const void* src;       // channel 0 of the first pixel
  Rep rep;               // kBits, kS16
  ptrdiff_t pixel_step;  // elements (words for bits)
  int pixels, groups;
  int channels;  // of one group
  int32_t* sum;
};

// --- enlarging by 2..kMaxResize, bicubic ---
// resize_down: row[x] = ((down[0] src[0][x] + down[1] src[1][x]) + down[2] src[2][x]) + down[3] src[3][x] for all
// pixels of a row, and two mirrored ones at either end. resize_across: pixel x factor + p of the result, for `pixels`
// pixels x from `first` on, is the same sum of row[x + from[p]] and the next three with across[p]. Every product and
// sum is rounded. Blocks of a row are 16 channels of a pixel, or of one channel with `flat` 16 pixels: the pixels of
// src, row and dst lie side by side.
inline constexpr int kMaxResize = 4;
inline constexpr int kResizeRing = 2;  // pixels at either end of a row

struct Resize {
  const float* src[4];
  float down[4];
  ptrdiff_t src_step;  // elements from pixel to pixel
  bool flat;
  int width, blocks, factor;
  const float* across;  // [phase][4]
  const int* from;      // [phase]
  float* row;           // pixel 0; a pixel has `blocks` blocks
  int first, pixels;
  float* dst;
  ptrdiff_t dst_step;
};

// --- epilogue: the ordered float32 steps behind a producer, and where their results go ---
enum class Step : uint8_t {
  kMul,            // v = v * constant
  kAdd,            // v = v + constant
  kAddF32,         // v = v + stored float32
  kAddF16,         // v = v + stored float16
  kAddSum,         // v = v + (stored float32, one a pixel) * constant
  kAddSums,        // v = v + (stored float32) * constant
  kAddBorder,      // v = v + border, one float32 for the pixel's border class and channel
  kPrelu,          // v = v < 0 ? v * constant : v
  kRelu,           // v = v > 0 ? v : +0
  kClip,           // v = v < low ? low : (v > high ? high : v)
  kRoundHalf,      // v = float16(v)
  kRoundStoreF16,  // kRoundHalf, then kStoreF16
  kStoreI32,       // only first, only from an int32 source
  kStoreF32,
  kStoreF16,
  kStoreS16,   // v is an integer
  kStoreBits,  // bit = !(v < 0)
  kStoreHalfBits,
  kCodeBits,  // bit = clamp(rint(v * scale), 0, 1)
  kCodeHalfBits,
  kSignS16,    // v < 0 ? -1 : +1
  kQuantS16,   // clamp(rint(v * scale), low, high)
  kStoreU8,    // v - low, v is an integer
  kSignU8,     // v < 0 ? 0 : 2
  kQuantU8,    // clamp(rint(v * scale), low, high) - low
  kThreshold,  // bit = (acc >= limit) xor flip, only from an int32 source, only step
  kThresholdHalfBits,
};

struct EpilogueStep {
  Step step;
  const float* constant = nullptr;  // one per channel, filled up to whole blocks
  const int32_t* limit = nullptr;
  const uint16_t* flip = nullptr;  // one bit per channel, 16 a block
  float low = 0, high = 0, scale = 0;
  int slot = -1;            // which pointer of Epilogue::slots a load or store uses
  ptrdiff_t slot_step = 0;  // elements (words for bits) from pixel to pixel
};

struct Epilogue {
  const EpilogueStep* steps;
  int count;
  const void* src;
  Rep rep;             // kS16, kI32, kF32, kF16
  ptrdiff_t src_step;  // elements from pixel to pixel
  int pixels;
  int src_block;            // block 0 of `src` is this block of the channels
  int first_block, blocks;  // which blocks of the channels to do
  int channels;             // of the whole value: bits beyond them are written 0
  void* const* slots;       // channel 0 of the first pixel
  // kAddBorder: `border + border_offset[pixel]` is one float32 for every channel.
  const float* border;
  const int32_t* border_offset;
};

struct Kernels {
  const char* isa;
  void (*bit_threshold)(const BitConv&);
  void (*bit_steps)(const BitConv&);
  void (*half_threshold)(const BitConv&);  // these two are null where nothing counts the bits of 16-bit lanes
  void (*half_steps)(const BitConv&);
  void (*int_gemm)(const Gemm&);
  void (*byte_gemm)(const Gemm&);  // null where the CPU has nothing faster than int_gemm for it
  void (*float_gemm)(const Gemm&);
  void (*tables)(const Tables&);  // these two are null where nothing looks up 64 bytes at once
  void (*table_conv)(const TableConv&);
  void (*planes)(const Planes&);
  void (*line_conv)(const LineConv&);
  void (*patches)(const Patches&);
  void (*depthwise)(const Window&);
  void (*code_sums)(const CodeSums&);
  void (*sum_pool)(const Window&);
  void (*max_pool)(const Window&);
  void (*resize_down)(const Resize&);
  void (*resize_across)(const Resize&);
  void (*epilogue)(const Epilogue&);
  bool nibbles;  // of bit_threshold and bit_steps: whether groups of 32 and of 64 filters are to have such weights
};

}  // namespace lowbit
