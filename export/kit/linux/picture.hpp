// An image to the program's input, by spec.hpp. Plain C++17.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "spec.hpp"

namespace kit {

struct Picture {
  int width, height, channels;  // 1: grey, 3: RGB
  std::vector<std::uint8_t> bytes;  // row by row, channels last
};

// A binary PGM (P5) or PPM (P6) file, upright. For pixels from a decoder or a camera, make a Picture.
inline Picture read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  Picture found{};
  int most = 0;
  file >> kind;
  const auto number = [&file](int& into) {
    while (file >> std::ws && file.peek() == '#') {
      file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
    }
    file >> into;
  };
  number(found.width);
  number(found.height);
  number(most);
  file.get();
  if (!file || (kind != "P5" && kind != "P6") || most != 255 || found.width < 1 || found.height < 1) {
    throw std::runtime_error("not a binary PGM or PPM file with 8 bits: " + path);
  }
  found.channels = kind == "P5" ? 1 : 3;
  found.bytes.resize(static_cast<std::size_t>(found.width) * found.height * found.channels);
  file.read(reinterpret_cast<char*>(found.bytes.data()), static_cast<std::streamsize>(found.bytes.size()));
  if (!file) {
    throw std::runtime_error("the file ends early: " + path);
  }
  return found;
}

// The source pixels of a resized one and their weights: a triangle filter, as wide as the new pixel if larger.
struct Share {
  int first;
  std::vector<double> weights;
};

inline std::vector<Share> shares(int old_size, double begin, double length) {
  std::vector<Share> found;
  const double scale = length / kSizePx;
  const double reach = std::max(scale, 1.0);
  for (int place = 0; place < kSizePx; ++place) {
    const double center = begin + (place + 0.5) * scale;
    const int first = std::max(static_cast<int>(center - reach + 0.5), 0);
    const int end = std::min(static_cast<int>(center + reach + 0.5), old_size);
    Share share{first, {}};
    double sum = 0;
    for (int old = first; old < end; ++old) {
      share.weights.push_back(std::max(0.0, 1.0 - std::abs((old + 0.5 - center) / reach)));
      sum += share.weights.back();
    }
    for (double& weight : share.weights) {
      weight /= sum;
    }
    found.push_back(std::move(share));
  }
  return found;
}

// One channel, (height, width) to (kSizePx, kSizePx): along the rows, then along the columns.
inline std::vector<float> resized(const std::vector<float>& plane, int width, int height) {
  const double side = std::min(width, height);
  const bool cut = kCropCenter;
  const auto across = shares(width, cut ? (width - side) / 2 : 0, cut ? side : width);
  const auto down = shares(height, cut ? (height - side) / 2 : 0, cut ? side : height);
  const auto kept = [](double value) { return static_cast<float>(kRounded ? std::floor(value + 0.5) : value); };
  std::vector<float> narrow(static_cast<std::size_t>(height) * kSizePx);
  std::vector<float> found(static_cast<std::size_t>(kSizePx) * kSizePx);
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < kSizePx; ++x) {
      double sum = 0;
      for (std::size_t i = 0; i < across[x].weights.size(); ++i) {
        sum += across[x].weights[i] * plane[static_cast<std::size_t>(y) * width + across[x].first + i];
      }
      narrow[static_cast<std::size_t>(y) * kSizePx + x] = kept(sum);
    }
  }
  for (int y = 0; y < kSizePx; ++y) {
    for (int x = 0; x < kSizePx; ++x) {
      double sum = 0;
      for (std::size_t i = 0; i < down[y].weights.size(); ++i) {
        sum += down[y].weights[i] * narrow[(down[y].first + i) * kSizePx + x];
      }
      found[static_cast<std::size_t>(y) * kSizePx + x] = kept(sum);
    }
  }
  return found;
}

// The program's input, channels first, kMean.size() of them.
inline std::vector<float> inputs(const Picture& picture) {
  const std::size_t pixels = static_cast<std::size_t>(picture.width) * picture.height;
  const int planes = kGrey ? 1 : 3;
  std::vector<float> found;
  std::vector<float> small;
  for (std::size_t channel = 0; channel < kMean.size(); ++channel) {
    if (static_cast<int>(channel) < planes) {
      std::vector<float> plane(pixels);
      for (std::size_t at = 0; at < pixels; ++at) {
        const std::uint8_t* pixel = &picture.bytes[at * picture.channels];
        if (picture.channels == 1) {
          plane[at] = pixel[0];
        } else if (kGrey) {  // with Pillow's weights
          plane[at] = static_cast<float>((pixel[0] * 19595 + pixel[1] * 38470 + pixel[2] * 7471 + 0x8000) >> 16);
        } else {
          plane[at] = pixel[channel];
        }
      }
      small = resized(plane, picture.width, picture.height);
    }
    for (const float value : small) {
      found.push_back((value * kScale - kMean[channel]) / kStd[channel]);
    }
  }
  return found;
}

}  // namespace kit
