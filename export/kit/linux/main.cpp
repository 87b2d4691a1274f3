// Answers of the program in the parent folder, for texts or for image files. See README.md for how to build it.
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <string>
#include <vector>

#include "spec.hpp"
#if KIT_TEXT
#include "text.hpp"
#else
#include "picture.hpp"
#endif

using executorch::aten::ScalarType;
using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::runtime::EValue;

namespace {

// Prints the three most likely classes.
void show(const char* row, const float* logits, std::size_t classes) {
  std::vector<double> scores(logits, logits + classes);
  const double highest = *std::max_element(scores.begin(), scores.end());
  double sum = 0;
  for (double& score : scores) {
    score = std::exp(score - highest);
    sum += score;
  }
  std::vector<std::size_t> order(classes);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&scores](std::size_t a, std::size_t b) { return scores[a] > scores[b]; });
  std::printf("%s:", row);
  for (std::size_t place = 0; place < std::min<std::size_t>(3, classes); ++place) {
    const std::size_t label = order[place];
    const std::string name = label < kit::kLabels.size() ? kit::kLabels[label] : std::to_string(label);
    std::printf("%s %s %.1f %%", place > 0 ? "," : "", name.c_str(), 100 * scores[label] / sum);
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s FOLDER (TEXT|IMAGE.ppm)...   FOLDER: the folder of model.pte\n", argv[0]);
    return 2;
  }
  const std::string folder = std::string(argv[1]) + "/";
  Module module(folder + "model.pte");
#if KIT_TEXT
  const kit::Tokenizer tokenizer(folder + "cpp/vocab.txt");
#endif
  for (int row = 2; row < argc; ++row) {
#if KIT_TEXT
    auto [ids, mask] = kit::inputs(tokenizer, argv[row]);
    auto first = from_blob(ids.data(), {1, kit::kTokens}, ScalarType::Long);
    auto second = from_blob(mask.data(), {1, kit::kTokens}, ScalarType::Long);
    const std::vector<EValue> given{EValue(*first), EValue(*second)};
#else
    auto pixels = kit::inputs(kit::read(argv[row]));
    const int channels = static_cast<int>(kit::kMean.size());
    auto first = from_blob(pixels.data(), {1, channels, kit::kSizePx, kit::kSizePx});
    const std::vector<EValue> given{EValue(*first)};
#endif
    const auto outputs = module.forward(given);
    if (!outputs.ok()) {
      std::fprintf(stderr, "the program failed with error %d\n", static_cast<int>(outputs.error()));
      return 1;
    }
    const auto& logits = outputs->at(0).toTensor();
    show(argv[row], logits.const_data_ptr<float>(), static_cast<std::size_t>(logits.numel()));
  }
  return 0;
}
