// Generates answers with ExecuTorch's language runner.
import ExecuTorchLLM
import Foundation

public final class Generator {
  private struct Manifest: Decodable {
    struct Tokenizer: Decodable { let file: String }
    struct Language: Decodable {
      let max_tokens: Int
      let tokenizer: Tokenizer
    }
    let language: Language
  }

  private struct Chat: Decodable {
    let before: String
    let after: String
  }

  private let language: Manifest.Language
  private let chat: Chat
  private let runner: TextRunner

  public init() throws {
    let manifest: Manifest = try Generator.decoded("model.json")
    language = manifest.language
    chat = try Generator.decoded("chat.json")
    runner = TextRunner(
      modelPath: try Generator.resource("model.pte").path, tokenizerPath: try Generator.resource(language.tokenizer.file).path)
    try runner.load()
  }

  /// Answers one message without history; `onText` gets each piece of text. Do not call it on the main thread.
  public func answer(_ message: String, onText: @escaping (String) -> Void) throws {
    runner.reset()
    let config = Config {
      $0.sequenceLength = language.max_tokens
      $0.isEchoEnabled = false
      $0.temperature = 0
    }
    try runner.generate(chat.before + message + chat.after, config, tokenCallback: onText)
  }

  /// Stops an answer early.
  public func stop() { runner.stop() }

  private static func resource(_ name: String) throws -> URL {
    guard let url = Bundle.module.url(forResource: name, withExtension: nil) else {
      throw CocoaError(.fileNoSuchFile, userInfo: [NSFilePathErrorKey: name])
    }
    return url
  }

  private static func decoded<Value: Decodable>(_ name: String) throws -> Value {
    try JSONDecoder().decode(Value.self, from: Data(contentsOf: resource(name)))
  }
}
