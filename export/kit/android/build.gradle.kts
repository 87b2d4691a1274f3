// What the app's own build.gradle.kts needs. Keep the version: a program may not load with another one.
android {
    defaultConfig {
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") }  // what the package has
    }
}

dependencies {
    implementation("$package:$executorch")
}
