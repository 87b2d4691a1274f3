package org.edgetune.kit

import android.content.Context
import java.io.Closeable
import java.io.File
import org.json.JSONObject
import org.pytorch.executorch.extension.llm.LlmCallback
import org.pytorch.executorch.extension.llm.LlmModule

/** Generates answers with ExecuTorch's language runner. Do not use it on the main thread. */
class Generator(private val context: Context, temperature: Float = 0f) : Closeable {
    private val manifest = JSONObject(text("model.json"))
    private val language = manifest.getJSONObject("language")
    private val chat = JSONObject(text("chat.json"))
    private val module =
        LlmModule(
            file("model.pte", manifest.getString("sha256") + ".pte").absolutePath,
            file(tokenizer(), language.getJSONObject("tokenizer").getString("sha256") + ".json").absolutePath,
            temperature,
        )

    /** Answers one message without history; [onText] gets each piece of text as it is generated. */
    fun answer(message: String, onText: (String) -> Unit) {
        module.resetContext()
        val prompt = chat.getString("before") + message + chat.getString("after")
        var failure: String? = null
        val callback =
            object : LlmCallback {
                override fun onResult(result: String) = onText(result)

                override fun onError(errorCode: Int, message: String) {
                    failure = "error $errorCode: $message"
                }
            }
        module.generate(prompt, language.getInt("max_tokens"), callback, false)
        check(failure == null) { "the program failed: $failure" }
    }

    /** Stops an answer early. */
    fun stop() = module.stop()

    override fun close() = module.resetNative()

    private fun tokenizer() = language.getJSONObject("tokenizer").getString("file")

    private fun text(name: String): String = context.assets.open(name).bufferedReader().use { it.readText() }

    /** ExecuTorch reads files, and assets are not files: copied once, named by checksum. */
    private fun file(asset: String, name: String): File {
        val file = File(context.filesDir, name)
        if (file.exists()) return file
        val partial = File(context.filesDir, "$name.partial")
        context.assets.open(asset).use { from -> partial.outputStream().use { from.copyTo(it) } }
        check(partial.renameTo(file)) { "cannot write $file" }
        return file
    }
}
