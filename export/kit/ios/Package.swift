// swift-tools-version:5.9
import PackageDescription

let package = Package(
  name: "EdgetuneKit",
  platforms: [.iOS(.v17), .macOS(.v14)],
  products: [.library(name: "EdgetuneKit", targets: ["EdgetuneKit"])],
  dependencies: [
    // Keep the version: a program may not load with another one.
    .package(url: "https://github.com/pytorch/executorch.git", branch: "swiftpm-$executorch")
  ],
  targets: [
    .target(
      name: "EdgetuneKit",
      dependencies: [
$products
      ],
      resources: [
$resources
      ],
      linkerSettings: [.unsafeFlags(["-Wl,-all_load"])]  // backends and kernels register themselves when loaded
    )
  ]
)
