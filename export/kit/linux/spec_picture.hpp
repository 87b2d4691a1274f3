// What model.json says of this program, for C++. Made by edgetune; made anew with each kit.
#pragma once

#include <string>
#include <vector>

#define KIT_TEXT 0

namespace kit {

inline constexpr int kSizePx = $size_px;
inline constexpr bool kGrey = $grey;
inline constexpr bool kCropCenter = $crop_center;
inline constexpr bool kRounded = $rounded;
inline constexpr float kScale = $scale;
inline const std::vector<float> kMean = {$mean};
inline const std::vector<float> kStd = {$std};
inline const std::vector<std::string> kLabels = {$labels};

}  // namespace kit
