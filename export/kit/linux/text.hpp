// A text to the tokens of a BERT tokenizer, by spec.hpp and vocab.txt. Plain C++17. A special token that is spelled out
// in a text, such as [SEP], is split like any other word: Hugging Face's tokenizer would treat it as the token.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "spec.hpp"

namespace kit {

// UTF-8 to code points. An invalid byte becomes U+FFFD, which is dropped later.
inline std::u32string points(const std::string& text) {
  std::u32string found;
  for (std::size_t at = 0; at < text.size();) {
    const auto lead = static_cast<unsigned char>(text[at++]);
    int more = lead < 0x80 ? 0 : lead >> 5 == 6 ? 1 : lead >> 4 == 14 ? 2 : lead >> 3 == 30 ? 3 : -1;
    char32_t point = more < 0 ? 0xFFFD : more == 0 ? lead : lead & (0x3F >> more);
    for (; more > 0 && at < text.size() && static_cast<unsigned char>(text[at]) >> 6 == 2; --more) {
      point = point << 6 | (static_cast<unsigned char>(text[at++]) & 0x3F);
    }
    found += more > 0 ? U'\uFFFD' : point;
  }
  return found;
}

inline std::string utf8(const std::u32string& text) {
  std::string found;
  for (const char32_t point : text) {
    if (point < 0x80) {
      found += static_cast<char>(point);
      continue;
    }
    const int more = point < 0x800 ? 1 : point < 0x10000 ? 2 : 3;
    found += static_cast<char>((0xFF00 >> (more + 1) & 0xFF) | point >> 6 * more);
    for (int left = more - 1; left >= 0; --left) {
      found += static_cast<char>(0x80 | (point >> 6 * left & 0x3F));
    }
  }
  return found;
}

template <std::size_t count>
bool within(const Range (&ranges)[count], char32_t point) {
  const auto* after = std::upper_bound(
      ranges, ranges + count, point, [](char32_t value, const Range& range) { return value < range.first; });
  return after != ranges && point <= (after - 1)->last;
}

// Lower case and without accents, as spec.hpp sets it.
inline void fold(char32_t point, std::u32string& into) {
  if (kStripAccents && point >= 0xAC00 && point <= 0xD7A3) {  // Korean syllables are decomposed by arithmetic
    const char32_t place = point - 0xAC00;
    into += {static_cast<char32_t>(0x1100 + place / 588), static_cast<char32_t>(0x1161 + place % 588 / 28)};
    if (place % 28 != 0) {
      into += static_cast<char32_t>(0x11A7 + place % 28);
    }
    return;
  }
  const auto* end = kFolds + sizeof(kFolds) / sizeof(*kFolds);
  const auto* found = std::lower_bound(
      kFolds, end, point, [](const Fold& each, char32_t value) { return each.from < value; });
  if (found != end && found->from == point) {
    into += found->to;
  } else {
    into += point;
  }
}

// The words of a text: runs of characters between spaces, and each punctuation mark.
inline std::vector<std::u32string> words(const std::string& text) {
  std::u32string cleaned;
  for (char32_t point : points(text)) {
    if (kClean && within(kDropped, point)) {
      continue;
    }
    const bool alone = kChinese && within(kChineseCharacters, point);
    if (alone) {
      cleaned += U' ';
    }
    fold(point, cleaned);
    if (alone) {
      cleaned += U' ';
    }
  }
  std::vector<std::u32string> found(1);
  for (const char32_t point : cleaned) {
    const bool mark = within(kPunctuation, point);
    if ((mark || within(kSpaces, point)) && !found.back().empty()) {
      found.emplace_back();
    }
    if (mark) {
      found.back() += point;
      found.emplace_back();
    } else if (!within(kSpaces, point)) {
      found.back() += point;
    }
  }
  if (found.back().empty()) {
    found.pop_back();
  }
  return found;
}

class Tokenizer {
 public:
  // `path`: vocab.txt, one token per line; the line number, from 0, is its id.
  explicit Tokenizer(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
      throw std::runtime_error("no such file: " + path);
    }
    std::int64_t id = 0;
    for (std::string line; std::getline(file, line); ++id) {
      ids_.emplace(line, id);
    }
  }

  // The tokens of a text with the special ones, at most kMaxTokens.
  std::vector<std::int64_t> tokens(const std::string& text) const {
    std::vector<std::int64_t> inner;
    for (const std::u32string& word : words(text + kEnding)) {
      pieces(word, inner);
    }
    const std::size_t room = kMaxTokens - kBefore.size() - kAfter.size();
    if (inner.size() > room && kCutRight) {
      inner.resize(room);
    } else if (inner.size() > room) {
      inner.erase(inner.begin(), inner.end() - static_cast<std::ptrdiff_t>(room));
    }
    std::vector<std::int64_t> found(kBefore);
    found.insert(found.end(), inner.begin(), inner.end());
    found.insert(found.end(), kAfter.begin(), kAfter.end());
    return found;
  }

 private:
  // The longest pieces of a word in the vocabulary, from the left; the unknown token if a piece is missing.
  void pieces(const std::u32string& word, std::vector<std::int64_t>& into) const {
    const std::size_t known = into.size();
    for (std::size_t start = 0; start < word.size();) {
      std::size_t end = word.size() > kLongestWord ? start : word.size();
      for (; end > start; --end) {
        const auto found = ids_.find((start > 0 ? kPrefix : std::string()) + utf8(word.substr(start, end - start)));
        if (found != ids_.end()) {
          into.push_back(found->second);
          break;
        }
      }
      if (end == start) {
        into.resize(known);
        into.push_back(kUnknown);
        return;
      }
      start = end;
    }
  }

  std::unordered_map<std::string, std::int64_t> ids_;
};

// input_ids and attention_mask, both kTokens long.
inline std::pair<std::vector<std::int64_t>, std::vector<std::int64_t>> inputs(
    const Tokenizer& tokenizer, const std::string& text) {
  std::vector<std::int64_t> ids = tokenizer.tokens(text);
  std::vector<std::int64_t> mask(ids.size(), 1);
  ids.resize(kTokens, kPad);
  mask.resize(kTokens, 0);
  return {std::move(ids), std::move(mask)};
}

}  // namespace kit
