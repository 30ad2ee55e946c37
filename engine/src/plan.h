// A plan: the network as few fused steps, with packed constants and places in the workspace. Made once, at load.
#pragma once

#include <vector>

#include "arch.h"
#include "memory.h"
#include "network.h"

namespace lowbit {

inline int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// What kHalfBits kernels have in either half of a word.
inline int32_t Twice(int32_t x) { return int32_t(uint32_t(x) << 16 | (uint32_t(x) & 0xffff)); }
inline int64_t RepSize(Rep rep) {
  return rep == Rep::kU8 ? 1 : rep == Rep::kS16 || rep == Rep::kF16 || rep == Rep::kHalfBits ? 2 : 4;
}

// One stored form of one value. A value that both a popcount convolution and something else reads has two.
struct Buffer {
  Value value;  // -1: sums of codes, which are no value of the network
  Rep rep;
  Shape shape;
  int64_t pixel;                   // elements (words for bits) from pixel to pixel
  std::array<int, 4> ring = {};    // pixels of zeros around the image (top, left, bottom, right)
  int low = -1;                    // kBits: the code of bit 0
  std::vector<uint8_t> zero = {};  // kU8: the byte that stands for 0 in each channel
  int first = 0, last = 0;         // steps that write it and read it last
  int64_t offset = 0;              // in the workspace of a batch of 1; everything scales with the batch
  int64_t fill = 0;                // elements behind a row

  int64_t row() const { return (shape.width + ring[1] + ring[3]) * pixel + fill; }
  int64_t image_bytes() const { return (shape.height + ring[0] + ring[2]) * row() * RepSize(rep); }
  int64_t room() const { return RoundUp(image_bytes(), 64) + kSlack; }
  int64_t at(int64_t y, int64_t x) const {
    return ((y + ring[0]) * row() + (x + ring[1]) * pixel) * RepSize(rep);
  }  // bytes
};

enum class Producer : uint8_t {
  kInput,
  kBitConv,
  kGemm,
  kTableConv,
  kLineConv,
  kDepthwise,
  kCodeSums,
  kPool,
  kShuffle,
  kResize,
  kConcat,
  kFlatten,
  kElementwise,
};

struct PlanStep {
  Producer producer;
  Value node;                // the producer
  Shape shape;               // of everything this step writes
  std::vector<int> sources;  // buffers the producer reads
  Rep tile = Rep::kF32;      // what the producer hands to the epilogue
  std::vector<EpilogueStep> epilogue;
  std::vector<int> slots;     // the buffers behind the epilogue's slots
  std::vector<int> writes;    // the buffers among them that it fills
  bool batch_is_row = false;  // everything is 1 x 1: the batch takes the place of the width
  // Of one channel, stored without a gap between pixels: the epilogue takes 16 neighbouring pixels as the channels of
  // one. It fills rows up to whole blocks, before their ring gets its zeros.
  bool flat = false;
  std::vector<Aligned<float>> constants;

  // convolutions
  bool integer = false;
  bool bytes = false;        // integer, with bytes on both sides
  bool from_source = false;  // windows are read where they lie, row by row; else from copies (im2col)
  bool fused = false;        // the epilogue runs on the sums in registers
  int64_t rows = 1;          // of a window that is read where it lies
  int64_t blocks = 0;        // of 16 output channels (of one group, for grouped gemm)
  int64_t depth = 0;  // pairs or numbers of a window's row, words of a filter; of sums of codes: input rows that a
                      // window reaches over
  int64_t w_block = 0;
  int tile_pixels = 0;
  int64_t tile_step = 0;  // elements from pixel to pixel of the tile
  Aligned<uint32_t> bit_weights;
  Aligned<int16_t> int_weights;
  Aligned<int8_t> byte_weights;
  Aligned<uint8_t> table_weights;
  Aligned<int32_t> byte_start;  // what sums of bytes begin at: takes the zeros' part away

  // convolutions to a few filters. `blocks` counts sets of filters, `depth` input rows that a window reaches over
  int64_t plane_step = 0;

  // convolutions by tables. `blocks` counts sets of 64 filters, `depth` input rows that a window reaches over, `rows`
  // the rows of a window, or its taps where these are taken one by one
  int table_groups = 0;   // tables of a pixel
  int table_columns = 0;  // pixels of an input row that the windows of a strip reach
  int64_t strip = 0;      // output columns that are done together, all rows of them
  int groups_at_once = 0;
  int64_t partial_bytes = 0, partial_step = 0;  // the step is from the filters that are done together to the next
  int table_taps = 0;                           // of a row
  int together = 0, planes = 0, shift = 0;
  int32_t each = 0;          // what every byte of a window adds to the sum, beside what the weight bits pick
  int64_t rows_at_once = 0;  // of those whose sums fit 16 bits
  Aligned<float> float_weights;
  Aligned<int32_t> depth_weights;

  // enlarging: where the taps of each phase begin, and what they are multiplied by
  std::array<int, kMaxResize> from = {};
  std::array<float, kMaxResize * 4> taps_of = {};

  // border classes: where the numbers of an output row's class begin in `table` and `border`, in steps, and from there
  // those of its pixels' classes
  std::vector<int32_t> row_class, col_offset;
  int64_t row_class_step = 0;
  Aligned<float> border;  // what an input offset adds, per class and filter

  // popcount convolutions: base or limits per border class and filter
  bool threshold = false;
  bool rows_of_3 = false;       // the taps are 3 rows of 3 words side by side
  bool halves = false;          // kHalfBits: words are half as long
  bool nibbles = false;         // two or four blocks together have a byte for every four bits: twice the room
  std::vector<ptrdiff_t> taps;  // of each tap word: from a pixel's first tap, in words
  Aligned<int32_t> table;
  Aligned<int32_t> limit;  // thresholds of other integer producers
  int levels = 0;          // convolutions by tables: codes come from limits of 16 bits, as TableConv has them
  Aligned<int16_t> level_limits, level_flip;
  Aligned<uint16_t> flip;

  double nanoseconds = 0;  // a rough guess for one image: is this step worth waking threads for?
  StepInfo info;
};

struct Plan {
  std::vector<PlanStep> steps;
  std::vector<Buffer> buffers;
  int input = -1, output = -1;  // buffers
  int64_t workspace = 0;        // bytes, batch of 1
  int64_t scratch = 0;          // bytes, each thread
};

Plan MakePlan(const Network& network, const Kernels& kernels);

}  // namespace lowbit
