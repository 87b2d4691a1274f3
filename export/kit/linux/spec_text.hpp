// What model.json says of this program, for C++. Made by edgetune; made anew with each kit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#define KIT_TEXT 1

namespace kit {

inline constexpr int kTokens = $tokens;  // that the program takes
inline constexpr std::size_t kMaxTokens = $max_tokens;  // of a text, the special ones included
inline constexpr bool kCutRight = $cut_right;
inline constexpr std::int64_t kPad = $pad;
inline constexpr std::int64_t kUnknown = $unknown;
inline const std::vector<std::int64_t> kBefore = {$before};
inline const std::vector<std::int64_t> kAfter = {$after};
inline const std::string kEnding = $ending;
inline const std::string kPrefix = $prefix;
inline constexpr std::size_t kLongestWord = $longest_word;
inline constexpr bool kClean = $clean;
inline constexpr bool kChinese = $chinese;
inline constexpr bool kStripAccents = $strip_accents;
inline const std::vector<std::string> kLabels = {$labels};

struct Range {
  char32_t first, last;
};

struct Fold {
  char32_t from;
  const char32_t* to;
};

// Of Unicode $unicode
inline constexpr Range kPunctuation[] = {$punctuation};
inline constexpr Range kSpaces[] = {$spaces};
inline constexpr Range kDropped[] = {$dropped};
inline constexpr Range kChineseCharacters[] = {$chinese_characters};
inline constexpr Fold kFolds[] = {$folds};

}  // namespace kit
