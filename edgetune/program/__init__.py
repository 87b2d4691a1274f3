"""What an exported program is, without the compiler that makes it: operators, manifest, metadata for apps."""
