// Answers of a language model, by ExecuTorch's own runner.
import ExecuTorchLLM
import Foundation

public final class Talk {
  private struct Told: Decodable {
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

  private let language: Told.Language
  private let chat: Chat
  private let runner: TextRunner

  public init() throws {
    let told: Told = try Talk.decoded("model.json")
    language = told.language
    chat = try Talk.decoded("chat.json")
    runner = TextRunner(
      modelPath: try Talk.resource("model.pte").path, tokenizerPath: try Talk.resource(language.tokenizer.file).path)
    try runner.load()
  }

  /// One message, answered from scratch; `heard` gets each piece of text as it comes. Off the main thread, please.
  public func answer(_ message: String, heard: @escaping (String) -> Void) throws {
    runner.reset()
    let config = Config {
      $0.sequenceLength = language.max_tokens
      $0.isEchoEnabled = false
      $0.temperature = 0
    }
    try runner.generate(chat.before + message + chat.after, config, tokenCallback: heard)
  }

  /// Ends an answer early.
  public func stop() { runner.stop() }

  private static func resource(_ name: String) throws -> URL {
    guard let found = Bundle.module.url(forResource: name, withExtension: nil) else {
      throw CocoaError(.fileNoSuchFile, userInfo: [NSFilePathErrorKey: name])
    }
    return found
  }

  private static func decoded<Value: Decodable>(_ name: String) throws -> Value {
    try JSONDecoder().decode(Value.self, from: Data(contentsOf: resource(name)))
  }
}
