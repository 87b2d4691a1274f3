// The program and its model.json. Use a model from one thread at a time: it is not thread-safe.
import ExecuTorch
import Foundation

/// A class and its score; the scores of all classes add up to 1.
public struct Answer {
  public let label: String
  public let score: Double
}

public enum KitError: Swift.Error {
  case missing(String)
}

/// The part of model.json that an app reads.
struct Manifest: Decodable {
  struct Spec: Decodable {
    let name: String
    let shape: [Int]
  }

  struct WordPiece: Decodable {
    let lowercase: Bool
    let strip_accents: Bool
    let clean: Bool
    let chinese: Bool
    let prefix: String
    let longest_word: Int
    let unknown_id: Int64
    let before: [Int64]
    let after: [Int64]
  }

  struct Preprocessing: Decodable {
    // texts
    let tokenizer: String?
    let max_length: Int?
    let cut: String?
    let pad_id: Int64?
    let ending: String?
    let wordpiece: WordPiece?
    // images
    let size_px: Int?
    let color: String?
    let crop: String?
    let rounded: Bool?
    let scale: Float?
    let mean: [Float]?
    let std: [Float]?
  }

  struct Carried: Decodable {
    let preprocessing: Preprocessing
    let labels: [String]
  }

  struct Call: Decodable {
    let inputs: [Spec]
  }

  let calls: [Call]
  let carried: Carried

  var inputs: [Spec] { calls[0].inputs }
}

/// The program, loaded from the package's resources.
final class Model {
  let manifest: Manifest
  private let module: Module

  init() throws {
    manifest = try JSONDecoder().decode(Manifest.self, from: Data(contentsOf: Model.resource("model.json")))
    module = Module(filePath: try Model.resource("model.pte").path)
    try module.load("forward")
  }

  static func resource(_ name: String) throws -> URL {
    guard let url = Bundle.module.url(forResource: name, withExtension: nil) else { throw KitError.missing(name) }
    return url
  }

  /// The classes, the most likely first. `inputs` are in the order of `manifest.inputs`.
  func run(_ inputs: [ValueConvertible]) throws -> [Answer] {
    let output = try Tensor<Float>(module.forward(inputs))
    let logits = output.scalars().map(Double.init)
    let highest = logits.max() ?? 0
    let parts = logits.map { exp($0 - highest) }
    let sum = parts.reduce(0, +)
    let labels = manifest.carried.labels
    return parts.enumerated()
      .map { Answer(label: $0.offset < labels.count ? labels[$0.offset] : String($0.offset), score: $0.element / sum) }
      .sorted { $0.score > $1.score }
  }
}
