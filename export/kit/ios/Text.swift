// A text to an answer. A special token that is spelled out in a text, such as [SEP], is split like any other word:
// Hugging Face's tokenizer would treat it as the token.
import ExecuTorch
import Foundation

/// Answers for texts: `try TextModel().answer("a text").first?.label`.
public final class TextModel {
  private let model: Model
  private let tokenizer: WordPiece

  public init() throws {
    model = try Model()
    let how = model.manifest.carried.preprocessing
    guard let piece = how.wordpiece, let file = how.tokenizer else { throw KitError.missing("wordpiece") }
    tokenizer = try WordPiece(piece, vocabulary: WordPiece.vocabulary(Model.resource(file)))
  }

  /// The classes of a text, the most likely first.
  public func answer(_ text: String) throws -> [Answer] {
    let how = model.manifest.carried.preprocessing
    let shape = model.manifest.inputs[0].shape
    let width = shape[1]
    let tokens = tokenizer.tokens(
      text + (how.ending ?? ""), most: min(width, how.max_length ?? width), cutRight: how.cut != "left")
    let empty = width - tokens.count
    let ids = tokens + [Int64](repeating: how.pad_id ?? 0, count: empty)
    let mask = [Int64](repeating: 1, count: tokens.count) + [Int64](repeating: 0, count: empty)
    return try model.run(
      model.manifest.inputs.map { Tensor<Int64>($0.name == "attention_mask" ? mask : ids, shape: shape) })
  }
}

/// A tokenizer of the BERT family.
struct WordPiece {
  private let how: Manifest.WordPiece
  private let vocabulary: [String: Int64]

  init(_ how: Manifest.WordPiece, vocabulary: [String: Int64]) {
    self.how = how
    self.vocabulary = vocabulary
  }

  static func vocabulary(_ file: URL) throws -> [String: Int64] {
    struct File: Decodable {
      struct Model: Decodable { let vocab: [String: Int64] }
      let model: Model
    }
    return try JSONDecoder().decode(File.self, from: Data(contentsOf: file)).model.vocab
  }

  /// The tokens of a text with the special ones, at most `most`.
  func tokens(_ text: String, most: Int, cutRight: Bool) -> [Int64] {
    let found = words(text).flatMap(pieces)
    let room = most - how.before.count - how.after.count
    return how.before + (cutRight ? found.prefix(room) : found.suffix(room)) + how.after
  }

  /// Runs of characters between spaces, and each punctuation mark.
  private func words(_ text: String) -> [[Unicode.Scalar]] {
    var found: [[Unicode.Scalar]] = [[]]
    for scalar in folded(cleaned(Array(text.unicodeScalars))) {
      let mark = isPunctuation(scalar)
      let blank = scalar.properties.isWhitespace
      if (mark || blank) && !found[found.count - 1].isEmpty { found.append([]) }
      if mark || !blank { found[found.count - 1].append(scalar) }
      if mark { found.append([]) }
    }
    return found.filter { !$0.isEmpty }
  }

  private func cleaned(_ scalars: [Unicode.Scalar]) -> [Unicode.Scalar] {
    let kept = how.clean ? scalars.filter { !isDropped($0) } : scalars
    return how.chinese ? kept.flatMap { isChinese($0) ? [" ", $0, " "] : [$0] } : kept
  }

  private func folded(_ scalars: [Unicode.Scalar]) -> [Unicode.Scalar] {
    var found = scalars
    if how.strip_accents {
      let apart = string(found).decomposedStringWithCanonicalMapping
      found = apart.unicodeScalars.filter { $0.properties.generalCategory != .nonspacingMark }
    }
    return how.lowercase ? found.flatMap { Array($0.properties.lowercaseMapping.unicodeScalars) } : found
  }

  /// The longest pieces of a word in the vocabulary, from the left; the unknown token if a piece is missing.
  private func pieces(_ word: [Unicode.Scalar]) -> [Int64] {
    var found: [Int64] = []
    var start = 0
    while start < word.count {
      var end = word.count > how.longest_word ? start : word.count
      while end > start {
        if let id = vocabulary[(start > 0 ? how.prefix : "") + string(Array(word[start..<end]))] {
          found.append(id)
          break
        }
        end -= 1
      }
      if end == start { return [how.unknown_id] }
      start = end
    }
    return found
  }

  private func string(_ scalars: [Unicode.Scalar]) -> String {
    var found = String.UnicodeScalarView()
    found.append(contentsOf: scalars)
    return String(found)
  }

  private func isPunctuation(_ scalar: Unicode.Scalar) -> Bool {
    switch scalar.value {
    case 33...47, 58...64, 91...96, 123...126: return true
    default: break
    }
    switch scalar.properties.generalCategory {
    case .connectorPunctuation, .dashPunctuation, .openPunctuation, .closePunctuation, .initialPunctuation,
      .finalPunctuation, .otherPunctuation:
      return true
    default: return false
    }
  }

  private func isChinese(_ scalar: Unicode.Scalar) -> Bool {
    switch scalar.value {
    case 0x4E00...0x9FFF, 0x3400...0x4DBF, 0x20000...0x2A6DF, 0x2A700...0x2B73F, 0x2B740...0x2B81F,
      0x2B920...0x2CEAF, 0xF900...0xFAFF, 0x2F800...0x2FA1F:
      return true
    default: return false
    }
  }

  private func isDropped(_ scalar: Unicode.Scalar) -> Bool {
    switch scalar.value {
    case 9, 10, 13: return false
    case 0xFFFD: return true
    default: break
    }
    switch scalar.properties.generalCategory {
    case .control, .format, .unassigned, .privateUse, .surrogate: return true
    default: return false
    }
  }
}
