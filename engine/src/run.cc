// Engine: runs a plan, step by step, rows shared out among the threads.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <mutex>
#include <stdexcept>

#include "half.h"
#include "plan.h"
#include "pool.h"

namespace lowbit {
namespace {

// The memory of one run. Kept from run to run; grows to the largest batch seen.
struct Workspace {
  int64_t batch = 0;          // what `values` has room for
  int64_t placed = 0;         // the batch of `places`
  std::vector<char*> places;  // where each buffer of the plan begins
  Aligned<char> values;
  std::vector<Aligned<char>> guarded;  // for tests: one a buffer, in place of `values`
  std::vector<Aligned<char>> scratch;  // one a thread
};

// What one thread needs to compute rows of one step.
class RowRunner {
 public:
  RowRunner(const Plan& plan, const PlanStep& step, const Node& node, const Kernels& kernels, char* const* places,
            int64_t batch, const void* input, char* scratch)
      : plan_(plan),
        s_(step),
        n_(node),
        k_(kernels),
        places_(places),
        batch_(batch),
        input_(input),
        scratch_(scratch) {}

  // Rows are counted through all images; with batch_is_row, "rows" are pieces of tile_pixels images.
  void Rows(int64_t first, int64_t last) {
    if (s_.batch_is_row) {
      const int64_t piece = Piece(s_);
      const int64_t x0 = first * piece, x1 = std::min(last * piece, batch_);
      Row(0, 0, x0, x1);
      return;
    }
    const int64_t height = s_.shape.height;
    if (s_.producer == Producer::kCodeSums) std::fill_n(summed_rows(), s_.depth, int64_t{-1});
    if (s_.producer == Producer::kLineConv) {
      std::fill_n(line_rows(), s_.depth, int64_t{-1});
      if (!s_.flat) std::memset(scratch_, 0, size_t(s_.tile_pixels * s_.tile_step * 4));  // lanes without a filter
    }
    if (s_.producer == Producer::kBitConv) {  // one image at a time: groups of filters outside, rows inside
      while (first < last) {
        const int64_t image = first / height, y0 = first % height, y1 = std::min(height, y0 + last - first);
        ZeroRings(image, y0, y1);
        BitRows(image, y0, y1, 0, s_.shape.width);
        first += y1 - y0;
      }
      return;
    }
    if (s_.producer == Producer::kTableConv) {
      for (int64_t r = first; r < last; ++r) ZeroRings(r / height, r % height, r % height + 1);
      for (int64_t x = 0; x < s_.shape.width; x += s_.strip) {
        std::fill_n(table_scratch().ids, s_.depth, int64_t{-1});
        const int64_t end = std::min(x + s_.strip, s_.shape.width);
        for (int64_t r = first; r < last; ++r) TableRow(r / height, r % height, x, end);
      }
      return;
    }
    for (int64_t r = first; r < last; ++r) {
      if (!s_.flat) ZeroRings(r / height, r % height, r % height + 1);
      Row(r / height, r % height, 0, s_.shape.width);
      if (s_.flat) ZeroRings(r / height, r % height, r % height + 1);
    }
  }

  static int64_t Piece(const PlanStep& s) { return s.tile_pixels > 0 ? s.tile_pixels : 64; }

 private:
  const Buffer& buffer(int id) const { return plan_.buffers[size_t(id)]; }
  char* Start(int id, int64_t image) const { return places_[id] + image * buffer(id).image_bytes(); }
  char* At(int id, int64_t image, int64_t y, int64_t x) const { return Start(id, image) + buffer(id).at(y, x); }

  static void Zero(char* at, int64_t bytes) {  // few bytes, an even number: a call of memset costs more
    for (; bytes >= 8; bytes -= 8, at += 8) std::memset(at, 0, 8);
    for (; bytes > 0; bytes -= 2, at += 2) std::memset(at, 0, 2);
  }

  // The ring of zeros around rows y0 to y1 (and above the first, below the last row) of the buffers this step fills.
  void ZeroRings(int64_t image, int64_t y0, int64_t y1) const {
    for (int id : s_.writes) {
      const Buffer& b = buffer(id);
      if (b.ring == std::array<int, 4>{}) continue;
      char* const start = Start(id, image);
      if (b.rep == Rep::kU8) {
        for (int64_t y = y0; y < y1; ++y) RingOfBytes(b, start, y);
        continue;
      }
      const int64_t pixel = b.pixel * RepSize(b.rep), row = b.row() * RepSize(b.rep);
      const int64_t left = b.ring[1] * pixel, right = b.ring[3] * pixel;
      if (y0 == 0) std::memset(start, 0, size_t(b.ring[0] * row));
      char* at = start + (y0 + b.ring[0]) * row;
      Zero(at, left);
      at += left + b.shape.width * pixel;
      for (int64_t y = y0 + 1; y < y1; ++y, at += row) Zero(at, right + left);  // side by side
      Zero(at, right);
      if (y1 == b.shape.height) std::memset(at + right + b.fill * RepSize(b.rep), 0, size_t(b.ring[2] * row));
    }
  }

  static void RingOfBytes(const Buffer& b, char* start, int64_t y) {
    const auto fill = [&](int64_t row, int64_t first, int64_t pixels) {
      char* to = start + row * b.row() + first * b.pixel;
      for (int64_t p = 0; p < pixels; ++p, to += b.pixel) std::memcpy(to, b.zero.data(), b.zero.size());
    };
    const int64_t width = b.ring[1] + b.shape.width + b.ring[3], at = y + b.ring[0];
    for (int64_t r = 0; y == 0 && r < b.ring[0]; ++r) fill(r, 0, width);
    fill(at, 0, b.ring[1]);
    fill(at, b.ring[1] + b.shape.width, b.ring[3]);
    for (int64_t r = 1; y + 1 == b.shape.height && r <= b.ring[2]; ++r) fill(at + r, 0, width);
  }

  void Row(int64_t image, int64_t y, int64_t x0, int64_t x1) {
    switch (s_.producer) {
      case Producer::kInput: return InputRow(image, y);
      case Producer::kBitConv: return BitRows(image, y, y + 1, x0, x1);
      case Producer::kCodeSums: return CodeSumsRow(image, y);
      case Producer::kElementwise: {
        const Buffer& b = buffer(s_.sources[0]);
        for (int64_t x = x0; s_.flat && x < x1; x += s_.tile_pixels) {
          const int64_t pixels = std::min<int64_t>(s_.tile_pixels, x1 - x);
          Finish(At(s_.sources[0], image, y, x), b.pixel, image, y, x, pixels);
        }
        if (s_.flat) return;
        return Finish(At(s_.sources[0], image, y, x0), b.pixel, image, y, x0, x1 - x0);
      }
      case Producer::kResize: return ResizeRow(image, y);
      case Producer::kLineConv: return LineRow(image, y);
      default: break;
    }
    for (int64_t x = x0; x < x1; x += s_.tile_pixels) {
      const int64_t pixels = std::min<int64_t>(s_.tile_pixels, x1 - x);
      const void* tile = scratch_;
      int64_t tile_step = s_.tile_step;
      switch (s_.producer) {
        case Producer::kGemm:
          GemmTile(image, y, x, pixels);
          if (s_.fused) continue;
          break;
        case Producer::kDepthwise: DepthwiseTile(image, y, x, pixels); break;
        case Producer::kPool: PoolTile(image, y, x, pixels); break;
        case Producer::kShuffle: ShuffleTile(image, y, x, pixels); break;
        case Producer::kConcat: ConcatTile(image, y, x, pixels); break;
        default: tile = FlattenTile(image); break;
      }
      Finish(tile, tile_step, image, y, x, pixels);
    }
  }

  // The epilogue over `pixels` pixels of a row, all blocks or some. It has the places of its slots in `few_` or
  // `many_`.
  Epilogue EpilogueAt(int64_t image, int64_t y, int64_t x, int64_t pixels, int64_t first_block, int64_t blocks) {
    void** const slots = Slots();
    for (size_t i = 0; i < s_.slots.size(); ++i) slots[i] = At(s_.slots[i], image, y, x);
    Epilogue e{};
    e.steps = s_.epilogue.data();
    e.count = int(s_.epilogue.size());
    e.rep = s_.tile;
    e.pixels = int(pixels);
    e.src_block = e.first_block = int(first_block);
    e.blocks = int(blocks);
    e.channels = int(s_.shape.channels);
    e.slots = slots;
    if (s_.border.size()) {
      e.border = s_.border.data() + s_.row_class[size_t(y)] * s_.row_class_step;
      e.border_offset = s_.col_offset.data() + x;
    }
    return e;
  }

  // From row y - 1 to row y of the same image, where there is one before `end`.
  void NextRow(Epilogue& e, int64_t y, int64_t end) {
    if (y == end) return;
    void** const slots = Slots();
    for (size_t i = 0; i < s_.slots.size(); ++i) {
      const Buffer& b = buffer(s_.slots[i]);
      slots[i] = static_cast<char*>(slots[i]) + b.row() * RepSize(b.rep);
    }
    if (e.border) e.border = s_.border.data() + s_.row_class[size_t(y)] * s_.row_class_step;
  }

  void** Slots() {
    if (s_.slots.size() <= few_.size()) return few_.data();
    many_.resize(s_.slots.size());
    return many_.data();
  }

  void Finish(const void* tile, int64_t tile_step, int64_t image, int64_t y, int64_t x, int64_t pixels) {
    const int64_t lanes = s_.flat ? pixels : s_.shape.channels;
    Epilogue e = EpilogueAt(image, y, x, s_.flat ? 1 : pixels, 0, RoundUp(lanes, kLanes) / kLanes);
    e.src = tile;
    e.src_step = tile_step;
    k_.epilogue(e);
  }

  void InputRow(int64_t image, int64_t y) const {
    const Buffer& b = buffer(plan_.input);
    const int64_t count = b.shape.width * b.pixel;
    const int64_t at = (image * b.shape.height + y) * count;
    char* const to = At(plan_.input, image, y, 0);
    if (b.rep == Rep::kF32 || b.rep == Rep::kU8) {
      const int64_t size = RepSize(b.rep);
      std::memcpy(to, static_cast<const char*>(input_) + at * size, size_t(count * size));
      return;
    }
    const uint8_t* from = static_cast<const uint8_t*>(input_) + at;
    int16_t* out = reinterpret_cast<int16_t*>(to);
    const std::vector<int>& zero_point = n_.type.zero_point;
    const size_t channels = zero_point.size();
    const bool same =
        std::adjacent_find(zero_point.begin(), zero_point.end(), std::not_equal_to<>()) == zero_point.end();
    if (same) {
      const int16_t z = zero_point.empty() ? int16_t(0) : int16_t(zero_point[0]);
      for (int64_t i = 0; i < count; ++i) out[i] = int16_t(from[i] - z);
      return;
    }
    for (int64_t i = 0; i < count; i += int64_t(channels)) {
      for (size_t c = 0; c < channels; ++c) out[size_t(i) + c] = int16_t(from[size_t(i) + c] - zero_point[c]);
    }
  }

  void BitRows(int64_t image, int64_t y0, int64_t y1, int64_t x0, int64_t x1) {
    static constexpr int32_t kNoOffset[64] = {};
    const Buffer& b = buffer(s_.sources[0]);
    const Geometry& g = n_.geometry;
    const int64_t group_blocks = s_.blocks / n_.groups, group_words = b.pixel / n_.groups;
    const bool thresholds = s_.threshold && s_.epilogue.empty();
    const int64_t piece = s_.batch_is_row ? Piece(s_) : x1 - x0;
    const int64_t element = RepSize(b.rep);
    BitConv c{};
    c.taps = s_.taps.data();
    c.depth = int(s_.depth);
    c.rows_of_3 = s_.rows_of_3;
    c.pixel_step = s_.batch_is_row ? b.pixel : g.stride[1] * b.pixel;
    for (int64_t first = 0; first < s_.blocks;) {
      const int64_t group = first / group_blocks;
      const int64_t blocks = std::min<int64_t>(4, (group + 1) * group_blocks - first);
      c.w = s_.bit_weights.data() + first * s_.w_block * (s_.nibbles ? 2 : 1);
      c.blocks = int(blocks);
      c.nibbles = s_.nibbles && blocks % 2 == 0;
      for (int64_t x = x0; x < x1; x += piece) {
        c.pixels = int(std::min<int64_t>(piece, x1 - x));
        c.offset = s_.batch_is_row ? kNoOffset : s_.col_offset.data() + x;
        const char* row = Start(s_.sources[0], image) + b.at(y0 * g.stride[0] - g.padding[0], -g.padding[1]) +
                          (x * c.pixel_step + group * group_words) * element;
        Epilogue e{};
        if (thresholds) {
          const Buffer& to = buffer(s_.writes[0]);
          c.bits = At(s_.writes[0], image, y0, x) + first * 2;
          c.bits_step = to.pixel * RepSize(to.rep);
          c.half_bits = to.rep == Rep::kHalfBits;
        } else {
          e = EpilogueAt(image, y0, x, c.pixels, first, blocks);
          c.epilogue = &e;
        }
        for (int64_t y = y0; y < y1; ++y) {
          c.a = row;
          c.table = s_.table.data() + first * kLanes;
          if (!s_.batch_is_row) c.table += s_.row_class[size_t(y)] * s_.row_class_step;
          if (thresholds) {
            (s_.halves ? k_.half_threshold : k_.bit_threshold)(c);
            c.bits += buffer(s_.writes[0]).row() * RepSize(buffer(s_.writes[0]).rep);
          } else {
            (s_.halves ? k_.half_steps : k_.bit_steps)(c);
            NextRow(e, y + 1, y1);
          }
          row += g.stride[0] * b.row() * element;
        }
      }
      first += blocks;
    }
  }

  void GemmTile(int64_t image, int64_t y, int64_t x, int64_t pixels) {
    const Buffer& b = buffer(s_.sources[0]);
    const Weights& w = n_.weights;
    const Geometry& g = n_.geometry;
    const int64_t element = s_.integer ? 2 : 4, patch_step = s_.depth * (s_.integer ? 2 : 1);
    char* const patch = scratch_ + RoundUp(s_.tile_pixels * s_.tile_step * 4, 64) + kSlack;
    char* const part = patch + RoundUp(s_.tile_pixels * patch_step * element, 64) + kSlack;
    const int64_t filters = w.shape[0] / n_.groups;
    for (int group = 0; group < n_.groups; ++group) {
      Gemm m{};
      m.rows = int(s_.rows);
      if (s_.batch_is_row && s_.from_source) {
        m.a = At(s_.sources[0], image, y, x);
        m.a_step = b.pixel;
      } else if (s_.from_source) {
        m.a = At(s_.sources[0], image, y * g.stride[0] - g.padding[0], x * g.stride[1] - g.padding[1]);
        m.a_step = g.stride[1] * b.pixel;
        m.row_step = g.dilation[0] * b.row();
      } else {
        Patches p{};
        p.rep = b.rep;
        p.to_float = !s_.integer;
        p.pixel_step = b.pixel;
        p.row_step = b.row();
        p.channels = int(w.shape[3]);
        p.pixels = int(pixels);
        p.dst = patch;
        p.dst_step = patch_step;
        p.fill = int(patch_step);
        const char* const source = At(s_.sources[0], image, 0, 0) + group * w.shape[3] * RepSize(b.rep);
        if (s_.batch_is_row) {
          p.src = source + x * b.image_bytes();
          p.height = 1;
          p.width = int(pixels);
          p.rows = p.cols = p.stride_x = p.dilation_x = p.dilation_y = 1;
        } else {
          p.src = source;
          p.height = int(b.shape.height);
          p.width = int(b.shape.width);
          p.rows = n_.kernel[0];
          p.cols = n_.kernel[1];
          p.stride_x = g.stride[1];
          p.dilation_y = g.dilation[0];
          p.dilation_x = g.dilation[1];
          p.y = int(y * g.stride[0] - g.padding[0]);
          p.x = int(x * g.stride[1] - g.padding[1]);
        }
        k_.patches(p);
        m.a = patch;
        m.a_step = patch_step;
      }
      const int64_t from = group * s_.blocks * s_.w_block;
      m.w = s_.bytes     ? static_cast<const void*>(s_.byte_weights.data() + from)
            : s_.integer ? static_cast<const void*>(s_.int_weights.data() + from)
                         : s_.float_weights.data() + from;
      m.start = s_.byte_start.data();
      m.w_block = s_.w_block;
      m.pixels = int(pixels);
      m.depth = int(s_.depth);
      m.blocks = int(s_.blocks);
      if (s_.fused) {
        const Epilogue e = EpilogueAt(image, y, x, pixels, group * s_.blocks, s_.blocks);
        m.epilogue = &e;
        (s_.bytes ? k_.byte_gemm : s_.integer ? k_.int_gemm : k_.float_gemm)(m);
        continue;
      }
      m.out = part;
      m.out_step = s_.blocks * kLanes;
      (s_.integer ? k_.int_gemm : k_.float_gemm)(m);
      for (int64_t p = 0; p < pixels; ++p) {  // both int32 and float32 are 4 bytes
        std::memcpy(scratch_ + (p * s_.tile_step + group * filters) * 4, part + p * m.out_step * 4,
                    size_t(filters) * 4);
      }
    }
  }

  // Scratch of a kTableConv step: accumulators, partial sums of a tile, the tables of the last `depth` input rows and
  // which rows these are, the sums of their pixels, and what one window reaches of both.
  struct TableScratch {
    int32_t* acc;
    char* partial;
    uint8_t* tables;
    int64_t* ids;
    const uint8_t** rows;
    const int32_t** sum_rows;
    int32_t* sums;
  };

  int64_t table_row() const { return int64_t(s_.table_columns) * s_.table_groups * kTableBytes; }

  TableScratch table_scratch() const {
    TableScratch t;
    char* at = scratch_;
    t.acc = reinterpret_cast<int32_t*>(at);
    at += RoundUp(s_.tile_pixels * s_.tile_step * 4, 64);
    t.partial = at;
    at += s_.partial_bytes;
    t.tables = reinterpret_cast<uint8_t*>(at);
    at += s_.depth * table_row();
    t.ids = reinterpret_cast<int64_t*>(at);
    t.rows = reinterpret_cast<const uint8_t**>(t.ids + s_.depth);
    t.sum_rows = reinterpret_cast<const int32_t**>(t.rows + s_.rows);
    t.sums = reinterpret_cast<int32_t*>(t.sum_rows + n_.kernel[0]);
    return t;
  }

  void TableRow(int64_t image, int64_t y, int64_t x0, int64_t x1) {
    const Buffer& b = buffer(s_.sources[0]);
    const Geometry& g = n_.geometry;
    const TableScratch t = table_scratch();
    const int64_t top = y * g.stride[0], left = x0 * g.stride[1] - g.padding[1];
    const int columns = int((x1 - x0 - 1) * g.stride[1] + (n_.kernel[1] - 1) * g.dilation[1] + 1);
    const int64_t padded = b.shape.height + g.padding[0] + g.padding[2];
    const int64_t tap_step = int64_t(g.dilation[1]) * s_.table_groups * kTableBytes;
    for (int64_t r = 0, n = 0; r < n_.kernel[0]; ++r) {
      const int64_t row = top + r * g.dilation[0], slot = row % s_.depth, id = image * padded + row;
      uint8_t* const tables = t.tables + slot * table_row();
      int32_t* const sums = t.sums + slot * s_.table_columns;
      if (t.ids[slot] != id) {
        t.ids[slot] = id;
        const char* const from = At(s_.sources[0], image, row - g.padding[0], left);
        k_.tables({reinterpret_cast<const uint8_t*>(from), b.pixel, columns, int(b.shape.channels), s_.table_groups,
                   tables, sums});
      }
      t.sum_rows[r] = sums;
      for (int64_t column = 0; column < n_.kernel[1]; column += s_.table_taps) t.rows[n++] = tables + column * tap_step;
    }
    TableConv c{};
    c.taps = s_.table_taps;
    c.tap_step = tap_step;
    c.together = s_.together;
    c.pixel_step = int64_t(g.stride[1]) * s_.table_groups * kTableBytes;
    c.w_row_step = s_.w_block / s_.rows;
    c.planes = s_.planes;
    c.set_step = s_.w_block;
    c.shift = s_.shift;
    c.sums = t.sum_rows;
    c.sum_rows = n_.kernel[0];
    c.sum_taps = n_.kernel[1];
    c.sum_tap_step = g.dilation[1];
    c.sum_step = g.stride[1];
    c.each = s_.each;
    c.acc = t.acc;
    c.acc_step = s_.tile_step;
    c.levels = s_.levels;
    for (int64_t x = x0; x < x1; x += s_.tile_pixels) {
      c.pixels = int(std::min<int64_t>(s_.tile_pixels, x1 - x));
      for (int group = 0; group < s_.table_groups; group += s_.groups_at_once) {
        c.first_group = group;
        c.groups = std::min(s_.groups_at_once, s_.table_groups - group);
        c.begins = group == 0;
        c.ends = group + c.groups == s_.table_groups;
        TableSets(c, t, image, y, x);
      }
      for (int64_t r = 0; r < s_.rows; ++r) t.rows[r] += c.pixels * c.pixel_step;
      for (int64_t r = 0; r < n_.kernel[0]; ++r) t.sum_rows[r] += c.pixels * c.sum_step;
    }
  }

  // Some groups of channels of a tile, for all filters.
  void TableSets(TableConv& c, const TableScratch& t, int64_t image, int64_t y, int64_t x) {
    const int64_t all_blocks = RoundUp(s_.shape.channels, kLanes) / kLanes, most = s_.tile_step / kTableFilters;
    for (int64_t set = 0; set < s_.blocks; set += most) {
      c.sets = int(std::min(most, s_.blocks - set));
      c.start = s_.byte_start.data() + set * kTableFilters;
      c.partial = t.partial + set / most * s_.partial_step;
      if (s_.levels > 0) {
        c.limits = s_.level_limits.data() + set * s_.levels * kTableFilters;
        c.flip = s_.level_flip.data() + set * kTableFilters;
        c.filters = int(s_.shape.channels - set * kTableFilters);
        c.codes = reinterpret_cast<uint8_t*>(At(s_.slots[0], image, y, x)) + set * kTableFilters;
        c.codes_step = s_.epilogue[0].slot_step;
      }
      for (int64_t r = 0; r < s_.rows; r += s_.rows_at_once) {
        c.row_count = int(std::min(s_.rows_at_once, s_.rows - r));
        c.rows = t.rows + r;
        c.w = s_.table_weights.data() + set * s_.w_block + r * c.w_row_step;
        c.more = r > 0;
        k_.table_conv(c);
      }
      if (s_.levels > 0 || !c.ends) continue;
      const int64_t first_block = set * (kTableFilters / kLanes);
      const int64_t blocks = std::min<int64_t>(c.sets * (kTableFilters / kLanes), all_blocks - first_block);
      Epilogue e = EpilogueAt(image, y, x, c.pixels, first_block, blocks);
      e.src = t.acc;
      e.src_step = s_.tile_step;
      k_.epilogue(e);
    }
  }

  // The part of a window that lies inside an axis of the input: taps first..last.
  static std::pair<int64_t, int64_t> Inside(int64_t at, int64_t taps, int64_t dilation, int64_t size) {
    const int64_t first = at >= 0 ? 0 : (-at + dilation - 1) / dilation;
    const int64_t last = at >= size ? 0 : std::min(taps, (size - 1 - at) / dilation + 1);
    return {first, std::max(first, last)};
  }

  // Scratch of a kCodeSums step: which input rows are summed over their channels (as image * height + row, -1: none),
  // the sums of these `depth` rows, of the columns under one output row and of the windows.
  int64_t* summed_rows() const { return reinterpret_cast<int64_t*>(scratch_); }

  // The sums over the channels of one input row. As many rows are kept as a window reaches over.
  const int32_t* ChannelSums(int64_t image, int64_t row) const {
    const Buffer& b = buffer(s_.sources[0]);
    const int64_t id = image * b.shape.height + row, slot = row % s_.depth;
    int32_t* const sums = reinterpret_cast<int32_t*>(summed_rows() + s_.depth) + slot * b.shape.width * n_.groups;
    if (summed_rows()[slot] != id) {
      summed_rows()[slot] = id;
      k_.code_sums({At(s_.sources[0], image, row, 0), b.rep, b.pixel, int(b.shape.width), n_.groups,
                    int(b.shape.channels / n_.groups), sums});
    }
    return sums;
  }

  void CodeSumsRow(int64_t image, int64_t y) const {
    const Buffer& b = buffer(s_.sources[0]);
    const Buffer& to = buffer(s_.writes[0]);
    const Geometry& g = n_.geometry;
    const int64_t groups = n_.groups, filters = to.shape.channels / groups, row = b.shape.width * groups;
    int32_t* const column = reinterpret_cast<int32_t*>(summed_rows() + s_.depth) + s_.depth * row;
    int32_t* const total = column + row;
    std::memset(column, 0, size_t(row + to.shape.width * groups) * 4);
    const int64_t top = y * g.stride[0] - g.padding[0];
    const auto [r0, r1] = Inside(top, n_.kernel[0], g.dilation[0], b.shape.height);
    for (int64_t r = r0; r < r1; ++r) {
      const int32_t* const sums = ChannelSums(image, top + r * g.dilation[0]);
      for (int64_t i = 0; i < row; ++i) column[i] += sums[i];
    }
    const int64_t stride = g.stride[1];
    for (int64_t c = 0; c < n_.kernel[1]; ++c) {
      // The output columns x where this tap is inside: 0 <= x stride + at < width.
      const int64_t at = c * g.dilation[1] - g.padding[1];
      const int64_t first = std::max<int64_t>(0, (-at + stride - 1) / stride);
      const int64_t last = at >= b.shape.width ? 0 : std::min(to.shape.width, (b.shape.width - 1 - at) / stride + 1);
      if (stride == 1) {
        for (int64_t i = first * groups; i < last * groups; ++i) total[i] += column[i + at * groups];
        continue;
      }
      for (int64_t x = first; x < last; ++x) {
        for (int64_t i = 0; i < groups; ++i) total[x * groups + i] += column[(x * stride + at) * groups + i];
      }
    }
    float* out = reinterpret_cast<float*>(At(s_.writes[0], image, y, 0));
    if (groups == 1) {
      std::copy_n(total, to.shape.width, out);
      return;
    }
    for (int64_t x = 0; x < to.shape.width; ++x, out += to.pixel) {
      for (int64_t i = 0; i < groups; ++i) std::fill_n(out + i * filters, filters, float(total[x * groups + i]));
    }
  }

  // Scratch of a kLineConv step, behind the tile: the planes of the last `depth` input rows, and which rows these are.
  float* line_planes() const {
    return reinterpret_cast<float*>(scratch_ + RoundUp(s_.tile_pixels * s_.tile_step * 4, 64) + kSlack);
  }
  int64_t line_row() const { return buffer(s_.sources[0]).shape.channels * s_.plane_step; }
  int64_t* line_rows() const { return reinterpret_cast<int64_t*>(line_planes() + s_.depth * line_row()); }

  void LineRow(int64_t image, int64_t y) {
    const Buffer& b = buffer(s_.sources[0]);
    const Geometry& g = n_.geometry;
    const int64_t channels = b.shape.channels, width = b.shape.width;
    const int64_t top = y - g.padding[0], left = g.padding[1], right = g.padding[3];
    const auto [r0, r1] = Inside(top, n_.kernel[0], g.dilation[0], b.shape.height);
    std::array<const float*, 11> rows = {};  // as many as kernels have
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t at = top + r * g.dilation[0], slot = at % s_.depth, id = image * b.shape.height + at;
      float* const planes = line_planes() + slot * line_row();
      rows[size_t(r - r0)] = planes;
      if (line_rows()[slot] == id) continue;
      line_rows()[slot] = id;
      k_.planes(
          {At(s_.sources[0], image, at, 0), b.rep, b.pixel, int(width), int(channels), planes + left, s_.plane_step});
      for (int64_t k = 0; k < channels; ++k) {
        std::fill_n(planes + k * s_.plane_step, left, 0.0f);
        std::fill_n(planes + k * s_.plane_step + left + width, right, 0.0f);
      }
    }
    LineConv c{};
    c.row_count = int(r1 - r0);
    c.columns = n_.kernel[1];
    c.channels = int(channels);
    c.tap_step = g.dilation[1];
    c.plane_step = s_.plane_step;
    c.w = s_.float_weights.data();
    c.set_step = s_.w_block;
    c.filters = int(n_.weights.shape[0]);
    c.out = reinterpret_cast<float*>(scratch_);
    c.out_step = s_.tile_step;
    c.first = r0 * n_.kernel[1] * channels;
    c.rows = rows.data();
    for (int64_t x = 0; x < s_.shape.width; x += s_.tile_pixels) {
      c.pixels = int(std::min<int64_t>(s_.tile_pixels, s_.shape.width - x));
      k_.line_conv(c);
      Finish(scratch_, s_.tile_step, image, y, x, c.pixels);
      for (int r = 0; r < c.row_count; ++r) rows[size_t(r)] += s_.tile_pixels;
    }
  }

  Window InputWindow(int64_t image, int64_t y, int64_t x) const {
    const Buffer& b = buffer(s_.sources[0]);
    const Geometry& g = n_.geometry;
    const bool whole = n_.op == Op::kGlobalAvgPool;
    const int64_t rows = whole ? b.shape.height : n_.kernel[0], cols = whole ? b.shape.width : n_.kernel[1];
    const int64_t top = y * g.stride[0] - g.padding[0], left = x * g.stride[1] - g.padding[1];
    const auto [r0, r1] = Inside(top, rows, g.dilation[0], b.shape.height);
    const auto [c0, c1] = Inside(left, cols, g.dilation[1], b.shape.width);
    Window w{};
    w.rep = b.rep;
    w.rows = int(r1 - r0);
    w.cols = int(c1 - c0);
    // No tap inside: the loops are empty and `src` is not read.
    const bool empty = w.rows == 0 || w.cols == 0;
    w.src = Start(s_.sources[0], image) + (empty ? 0 : b.at(top + r0 * g.dilation[0], left + c0 * g.dilation[1]));
    w.row_step = g.dilation[0] * b.row();
    w.col_step = g.dilation[1] * b.pixel;
    w.blocks = int(RoundUp(s_.shape.channels, kLanes) / kLanes);
    if (s_.producer == Producer::kDepthwise) {
      w.w_col_step = w.blocks * kLanes;
      w.w_row_step = w.w_col_step * n_.kernel[1];
      const int64_t from = r0 * w.w_row_step + c0 * w.w_col_step;
      w.integer = s_.integer;
      if (!empty)
        w.w = s_.integer ? static_cast<const void*>(s_.depth_weights.data() + from) : s_.float_weights.data() + from;
    } else {
      const bool all = whole || n_.count_include_pad;
      w.scale = 1.0f / float(all ? rows * cols : w.rows * w.cols);
    }
    return w;
  }

  void DepthwiseTile(int64_t image, int64_t y, int64_t x, int64_t pixels) const {
    for (int64_t p = 0; p < pixels; ++p) {
      Window w = InputWindow(image, y, x + p);
      w.out = scratch_ + p * s_.tile_step * 4;
      k_.depthwise(w);
    }
  }

  void PoolTile(int64_t image, int64_t y, int64_t x, int64_t pixels) const {
    for (int64_t p = 0; p < pixels; ++p) {
      Window w = InputWindow(image, y, x + p);
      w.out = scratch_ + p * s_.tile_step * 4;
      (n_.op == Op::kMaxPool ? k_.max_pool : k_.sum_pool)(w);
    }
  }

  template <typename T>
  void Shuffle(int64_t image, int64_t y, int64_t x, int64_t pixels) const {
    const int64_t r = n_.factor, channels = s_.shape.channels, step = buffer(s_.sources[0]).pixel;
    const T* pixel = reinterpret_cast<const T*>(At(s_.sources[0], image, y / r, x / r)) + y % r * r;
    T* to = reinterpret_cast<T*>(scratch_);
    int64_t j = x % r;
    if (s_.flat) {
      for (int64_t p = 0; p < pixels; p += r, pixel += step, to += r) {
        for (int64_t i = 0; i < r; ++i) to[i] = pixel[i];
      }
      return;
    }
    for (int64_t p = 0; p < pixels; ++p, to += s_.tile_step) {
      for (int64_t c = 0; c < channels; ++c) to[c] = pixel[c * r * r + j];
      if (++j == r) {
        j = 0;
        pixel += step;
      }
    }
  }

  void ResizeRow(int64_t image, int64_t y) {
    const Buffer& b = buffer(s_.sources[0]);
    const int64_t r = n_.factor, height = b.shape.height, width = b.shape.width;
    Resize c{};
    c.flat = s_.flat;
    c.width = int(width);
    c.blocks = int(s_.tile_step / kLanes);
    c.factor = int(r);
    c.across = s_.taps_of.data();
    c.from = s_.from.data();
    c.src_step = b.pixel;
    c.dst = reinterpret_cast<float*>(scratch_);
    c.dst_step = s_.tile_step;
    char* const rows = scratch_ + RoundUp(s_.tile_pixels * s_.tile_step * 4, 64) + kSlack;
    const int64_t before = kResizeRing * s_.tile_step, row_size = width + 2 * kResizeRing + kSlack / 4;
    c.row = reinterpret_cast<float*>(rows) + before;
    const int64_t top = y / r + s_.from[size_t(y % r)];
    for (int64_t k = 0; k < 4; ++k) {
      c.down[k] = s_.taps_of[size_t(y % r * 4 + k)];
      const int64_t at = ((top + k) % (2 * height) + 2 * height) % (2 * height);
      const float* const from =
          reinterpret_cast<const float*>(At(s_.sources[0], image, std::min(at, 2 * height - 1 - at), 0));
      c.src[k] = from;
      if (s_.flat && b.pixel != 1) {
        float* const dense = reinterpret_cast<float*>(rows) + (k + 1) * row_size;
        for (int64_t x = 0; x < width; ++x) dense[x] = from[x * b.pixel];
        c.src[k] = dense;
      }
    }
    k_.resize_down(c);
    for (int64_t x = 0; x < s_.shape.width; x += s_.tile_pixels) {
      const int64_t pixels = std::min<int64_t>(s_.tile_pixels, s_.shape.width - x);
      c.first = int(x / r);
      c.pixels = int(pixels / r);
      k_.resize_across(c);
      Finish(scratch_, s_.tile_step, image, y, x, pixels);
    }
  }

  void ShuffleTile(int64_t image, int64_t y, int64_t x, int64_t pixels) const {
    return RepSize(s_.tile) == 2 ? Shuffle<uint16_t>(image, y, x, pixels) : Shuffle<uint32_t>(image, y, x, pixels);
  }

  void ConcatTile(int64_t image, int64_t y, int64_t x, int64_t pixels) const {
    const int64_t element = RepSize(s_.tile);
    int64_t channel = 0;
    for (int id : s_.sources) {
      const Buffer& b = buffer(id);
      for (int64_t p = 0; p < pixels; ++p) {
        char* to = scratch_ + (p * s_.tile_step + channel) * element;
        std::memcpy(to, At(id, image, y, x + p), size_t(b.shape.channels * element));
      }
      channel += b.shape.channels;
    }
  }

  const void* FlattenTile(int64_t image) const {
    const int id = s_.sources[0];
    const Buffer& b = buffer(id);
    const char* from = Start(id, image);
    if (b.pixel == b.shape.channels && b.ring == std::array<int, 4>{} && b.fill == 0) return from;
    const int64_t bytes = b.shape.channels * RepSize(b.rep);
    char* to = scratch_;
    for (int64_t y = 0; y < b.shape.height; ++y) {
      for (int64_t x = 0; x < b.shape.width; ++x, to += bytes) std::memcpy(to, from + b.at(y, x), size_t(bytes));
    }
    return scratch_;
  }

  const Plan& plan_;
  const PlanStep& s_;
  const Node& n_;
  const Kernels& k_;
  char* const* places_;  // of the plan's buffers
  int64_t batch_;
  const void* input_;
  char* scratch_;
  std::array<void*, 16> few_;  // the places of the epilogue's slots, or in `many_`
  std::vector<void*> many_;
};

// One image of a buffer, dense and without ring; bits and bytes as int16 integers.
void Unload(const Buffer& b, const char* image, char* out) {
  const int64_t channels = b.shape.channels;
  for (int64_t y = 0; y < b.shape.height; ++y) {
    if (b.pixel == channels && (b.rep == Rep::kF32 || b.rep == Rep::kF16)) {
      const int64_t bytes = b.shape.width * channels * RepSize(b.rep);
      std::memcpy(out, image + b.at(y, 0), size_t(bytes));
      out += bytes;
      continue;
    }
    for (int64_t x = 0; x < b.shape.width; ++x) {
      const char* at = image + b.at(y, x);
      if (b.rep == Rep::kHalfBits) {
        const uint16_t bits = *reinterpret_cast<const uint16_t*>(at);
        int16_t* to = reinterpret_cast<int16_t*>(out);
        for (int64_t c = 0; c < channels; ++c) to[c] = int16_t((bits >> c) & 1 ? 1 : b.low);
        out += channels * 2;
      } else if (b.rep == Rep::kBits) {
        const uint32_t* words = reinterpret_cast<const uint32_t*>(at);
        int16_t* to = reinterpret_cast<int16_t*>(out);
        for (int64_t c = 0; c < channels; ++c) to[c] = int16_t((words[c / 32] >> (c % 32)) & 1 ? 1 : b.low);
        out += channels * 2;
      } else if (b.rep == Rep::kU8) {
        int16_t* to = reinterpret_cast<int16_t*>(out);
        for (int64_t c = 0; c < channels; ++c) to[c] = int16_t(uint8_t(at[c]) - b.zero[size_t(c)]);
        out += channels * 2;
      } else {
        std::memcpy(out, at, size_t(channels * RepSize(b.rep)));
        out += channels * RepSize(b.rep);
      }
    }
  }
}

int64_t DenseBytes(const Buffer& b) {
  return b.shape.height * b.shape.width * b.shape.channels *
         (b.rep == Rep::kBits || b.rep == Rep::kU8 ? 2 : RepSize(b.rep));  // codes come as int16
}

}  // namespace

struct Engine::Impl {
  std::shared_ptr<Network> network;
  Kernels kernels;
  Plan plan;
  int threads;
  // Nanoseconds. Waking the threads and waiting for the last one takes some microseconds.
  double worth_threads = 20'000;
  std::string isa;
  std::vector<StepInfo> infos;
  std::unique_ptr<ThreadPool> pool;
  std::mutex pool_mutex;   // held for a whole run where there is a pool
  std::mutex spare_mutex;  // guards `spare`
  std::vector<std::unique_ptr<Workspace>> spare;

  std::unique_ptr<Workspace> Borrow(int64_t batch) {
    std::unique_ptr<Workspace> w;
    {
      const std::lock_guard lock(spare_mutex);
      if (!spare.empty()) {
        w = std::move(spare.back());
        spare.pop_back();
      }
    }
    if (!w) {
      w = std::make_unique<Workspace>();
      for (int t = 0; t < threads; ++t) w->scratch.emplace_back(size_t(plan.scratch));
    }
    if (w->batch < batch) {
      if (plan.workspace > std::numeric_limits<int64_t>::max() / 2 / batch) throw std::bad_alloc();
      w->values = Aligned<char>();
      w->batch = 0;
      w->values = Aligned<char>(size_t(plan.workspace * batch));
      w->batch = batch;
    }
    if (w->placed != batch) {
      w->places.clear();
      for (const Buffer& b : plan.buffers) w->places.push_back(w->values.data() + b.offset * batch);
      w->placed = batch;
    }
    return w;
  }

  // The same against guard pages, filled with garbage.
  std::unique_ptr<Workspace> BorrowGuarded(int64_t batch, Guard side) const {
    auto w = std::make_unique<Workspace>();
    for (const Buffer& b : plan.buffers) {
      w->guarded.emplace_back(size_t(b.image_bytes() * batch), size_t(RepSize(b.rep)));
      w->places.push_back(w->guarded.back().data());
    }
    for (int t = 0; t < threads; ++t)
      w->scratch.emplace_back(size_t(plan.scratch - kSlack));  // whose own slack is in it
    for (auto* blocks : {&w->guarded, &w->scratch}) {
      for (Aligned<char>& block : *blocks) std::memset(block.data(), Garbage(side), block.size());
    }
    return w;
  }

  void Return(std::unique_ptr<Workspace> w) {
    if (!w->guarded.empty()) return;
    const std::lock_guard lock(spare_mutex);
    spare.push_back(std::move(w));
  }

  void Step(const PlanStep& step, Workspace& w, const void* input, int64_t batch, bool shared) {
    const Node& node = network->nodes[size_t(step.node)];
    const int64_t rows =
        step.batch_is_row ? (batch + RowRunner::Piece(step) - 1) / RowRunner::Piece(step) : batch * step.shape.height;
    const auto body = [&](int thread, int64_t first, int64_t last) {
      RowRunner(plan, step, node, kernels, w.places.data(), batch, input, w.scratch[size_t(thread)].data())
          .Rows(first, last);
    };
    if (!shared || step.nanoseconds * double(batch) < worth_threads) return body(0, 0, rows);
    pool->Run(rows, std::max<int64_t>(1, rows / (threads * 4)), body);
  }

  void Report(const Trace& trace, int step, const Workspace& w, int64_t batch) const {
    for (const Buffer& b : plan.buffers) {
      if (b.first != step || b.value < 0) continue;
      const int64_t bytes = DenseBytes(b);
      std::vector<char> dense(size_t(bytes * batch));
      const char* from = w.places[size_t(&b - plan.buffers.data())];
      for (int64_t i = 0; i < batch; ++i) Unload(b, from + i * b.image_bytes(), dense.data() + i * bytes);
      const Node& node = network->nodes[size_t(b.value)];
      trace(node.name, node.type, dense.data());
    }
  }
};

Engine::Engine(const Builder& builder, const Options& options) : impl_(std::make_unique<Impl>()) {
  const int cores = int(std::max(1u, std::thread::hardware_concurrency()));
  if (options.threads < 1 || options.threads > cores) {
    throw std::invalid_argument("threads must be 1.." + std::to_string(cores) + " on this CPU, got " +
                                std::to_string(options.threads));
  }
  const FloatMode mode;
  impl_->kernels = SelectKernels(options.isa, CpuFeatures());
  impl_->isa = impl_->kernels.isa;
  impl_->plan = MakePlan(*builder.network_, impl_->kernels);
  impl_->network = std::make_shared<Network>(WithoutConstants(*builder.network_));  // the plan has them packed
  impl_->threads = options.threads;
  for (const PlanStep& step : impl_->plan.steps) impl_->infos.push_back(step.info);
  if (options.threads > 1) impl_->pool = std::make_unique<ThreadPool>(options.threads);
}

Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;

const ValueType& Engine::input_type() const { return impl_->network->nodes.front().type; }
const ValueType& Engine::output_type() const { return impl_->network->nodes.back().type; }
const std::string& Engine::isa() const { return impl_->isa; }
int Engine::threads() const { return impl_->threads; }
const std::vector<StepInfo>& Engine::plan() const { return impl_->infos; }
int64_t Engine::workspace_bytes(int64_t batch) const {
  return impl_->plan.workspace * batch + impl_->plan.scratch * impl_->threads;
}

void Engine::Run(const void* input, int64_t batch, void* output, const Trace* trace,
                 std::vector<double>* seconds) const {
  if (batch < 1) throw std::invalid_argument("the batch is empty");
  Impl& impl = *impl_;
  std::unique_lock<std::mutex> lock(impl.pool_mutex, std::defer_lock);
  const bool shared = impl.pool && impl.pool->alive();
  if (shared) lock.lock();
  const Guard guard = CurrentGuard();
  std::unique_ptr<Workspace> w = guard == Guard::kNone ? impl.Borrow(batch) : impl.BorrowGuarded(batch, guard);
  const FloatMode mode;
  const std::vector<PlanStep>& steps = impl.plan.steps;
  for (size_t i = 0; i < steps.size(); ++i) {
    const auto start = std::chrono::steady_clock::now();
    impl.Step(steps[i], *w, input, batch, shared);
    if (seconds) (*seconds)[i] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    if (trace) impl.Report(*trace, int(i), *w, batch);
  }
  const Buffer& out = impl.plan.buffers[size_t(impl.plan.output)];
  const char* from = w->places[size_t(impl.plan.output)];
  for (int64_t i = 0; i < batch; ++i)
    Unload(out, from + i * out.image_bytes(), static_cast<char*>(output) + i * DenseBytes(out));
  impl.Return(std::move(w));
}

int64_t Engine::DebugNudgeThresholds(int delta) {
  int64_t count = 0;
  for (PlanStep& s : impl_->plan.steps) {
    if (!s.threshold) continue;
    const int64_t channels = s.shape.channels, padded = RoundUp(channels, kLanes);
    const bool counts = s.limit.size() == 0;              // a count starts at minus what it has to stay below
    const int64_t last = (s.halves ? 16 : 32) * s.depth;  // what constants have to stay below: 0, or more than all bits
    Aligned<int32_t>& limits = counts ? s.table : s.limit;
    for (size_t i = 0; i < limits.size(); ++i) {
      const int32_t limit = s.halves && counts ? int16_t(limits[i]) : limits[i];
      const bool constant = counts ? limit >= 0 || limit < -last : limit == INT32_MIN;
      if (int64_t(i) % padded >= channels || constant) continue;
      limits[i] = counts ? limit - delta : limit + delta;
      if (s.halves && counts) limits[i] = Twice(limits[i]);
      ++count;
    }
  }
  return count;
}

void Engine::DebugAlwaysShare() { impl_->worth_threads = 0; }

std::vector<IsaInfo> Isas() {
  std::vector<IsaInfo> out;
  for (const IsaRow& row : IsaRows(CpuFeatures())) out.push_back({row.name, row.available});
  return out;
}

}  // namespace lowbit
