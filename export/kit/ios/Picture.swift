// An image to an answer.
import CoreGraphics
import ExecuTorch
import Foundation

/// Answers for images: `try PictureModel().answer(image.cgImage!).first?.label`.
public final class PictureModel {
  private let model: Model
  private let sizePx: Int
  private let grey: Bool
  private let cropCenter: Bool
  private let rounded: Bool
  private let scale: Float
  private let mean: [Float]
  private let std: [Float]

  public init() throws {
    model = try Model()
    let how = model.manifest.carried.preprocessing
    guard let size = how.size_px, let mean = how.mean, let std = how.std else { throw KitError.missing("size_px") }
    sizePx = size
    grey = how.color == "grey"
    cropCenter = how.crop == "center"
    rounded = how.rounded ?? true
    scale = how.scale ?? 1
    self.mean = mean
    self.std = std
  }

  /// The classes of an upright image, the most likely first: a CGImage has no orientation.
  public func answer(_ picture: CGImage) throws -> [Answer] {
    let (width, height) = (picture.width, picture.height)
    var bytes = [UInt8](repeating: 0, count: width * height * 4)
    let drawn = bytes.withUnsafeMutableBytes { buffer -> Bool in
      guard
        let context = CGContext(
          data: buffer.baseAddress, width: width, height: height, bitsPerComponent: 8, bytesPerRow: width * 4,
          space: CGColorSpaceCreateDeviceRGB(), bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)
      else { return false }
      context.draw(picture, in: CGRect(x: 0, y: 0, width: width, height: height))
      return true
    }
    guard drawn else { throw KitError.missing("pixels") }
    return try model.run([Tensor<Float>(inputs(bytes, width, height), shape: model.manifest.inputs[0].shape)])
  }

  /// Bytes R, G, B, unused, row by row, to channels first.
  func inputs(_ bytes: [UInt8], _ width: Int, _ height: Int) -> [Float] {
    var found: [Float] = []
    var small: [Float] = []
    for channel in mean.indices {
      if channel < (grey ? 1 : 3) {
        let plane = (0..<(width * height)).map { at -> Float in
          if !grey { return Float(bytes[at * 4 + channel]) }
          // grey with Pillow's weights
          let (r, g, b) = (Int(bytes[at * 4]), Int(bytes[at * 4 + 1]), Int(bytes[at * 4 + 2]))
          return Float((r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16)
        }
        small = resized(plane, width, height)
      }
      found += small.map { ($0 * scale - mean[channel]) / std[channel] }
    }
    return found
  }

  /// The source pixels of a resized one and their weights: a triangle filter, as wide as the new pixel if larger.
  private func shares(_ oldSize: Int, _ begin: Double, _ length: Double) -> [(first: Int, weights: [Double])] {
    (0..<sizePx).map { place in
      let scale = length / Double(sizePx)
      let reach = max(scale, 1)
      let center = begin + (Double(place) + 0.5) * scale
      let first = max(Int(center - reach + 0.5), 0)
      let end = min(Int(center + reach + 0.5), oldSize)
      let weights = (first..<end).map { max(0, 1 - abs((Double($0) + 0.5 - center) / reach)) }
      let sum = weights.reduce(0, +)
      return (first, weights.map { $0 / sum })
    }
  }

  private func kept(_ value: Double) -> Float { Float(rounded ? (value + 0.5).rounded(.down) : value) }

  private func resized(_ plane: [Float], _ width: Int, _ height: Int) -> [Float] {
    let side = Double(min(width, height))
    let (w, h) = (Double(width), Double(height))
    let across = shares(width, cropCenter ? (w - side) / 2 : 0, cropCenter ? side : w)
    let down = shares(height, cropCenter ? (h - side) / 2 : 0, cropCenter ? side : h)
    var narrow = [Float](repeating: 0, count: height * sizePx)
    for y in 0..<height {
      for x in 0..<sizePx {
        var sum = 0.0
        for (i, weight) in across[x].weights.enumerated() {
          sum += weight * Double(plane[y * width + across[x].first + i])
        }
        narrow[y * sizePx + x] = kept(sum)
      }
    }
    var found = [Float](repeating: 0, count: sizePx * sizePx)
    for y in 0..<sizePx {
      for x in 0..<sizePx {
        var sum = 0.0
        for (i, weight) in down[y].weights.enumerated() {
          sum += weight * Double(narrow[(down[y].first + i) * sizePx + x])
        }
        found[y * sizePx + x] = kept(sum)
      }
    }
    return found
  }
}
