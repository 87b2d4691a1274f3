package org.edgetune.kit

import android.content.Context
import java.io.Closeable
import java.io.File
import org.json.JSONObject
import org.pytorch.executorch.extension.llm.LlmCallback
import org.pytorch.executorch.extension.llm.LlmModule

/** Answers of a language model, by ExecuTorch's own runner. Off the main thread, please. */
class Talk(private val context: Context, temperature: Float = 0f) : Closeable {
    private val told = JSONObject(text("model.json"))
    private val language = told.getJSONObject("language")
    private val chat = JSONObject(text("chat.json"))
    private val module =
        LlmModule(
            file("model.pte", told.getString("sha256") + ".pte").absolutePath,
            file(tokenizer(), language.getJSONObject("tokenizer").getString("sha256") + ".json").absolutePath,
            temperature,
        )

    /** One message, answered from scratch; [heard] gets each piece of text as it comes. */
    fun answer(message: String, heard: (String) -> Unit) {
        module.resetContext()
        val prompt = chat.getString("before") + message + chat.getString("after")
        var failure: String? = null
        val callback =
            object : LlmCallback {
                override fun onResult(result: String) = heard(result)

                override fun onError(errorCode: Int, message: String) {
                    failure = "error $errorCode: $message"
                }
            }
        module.generate(prompt, language.getInt("max_tokens"), callback, false)
        check(failure == null) { "the program failed: $failure" }
    }

    /** Ends an answer early. */
    fun stop() = module.stop()

    override fun close() = module.resetNative()

    private fun tokenizer() = language.getJSONObject("tokenizer").getString("file")

    private fun text(name: String): String = context.assets.open(name).bufferedReader().use { it.readText() }

    /** ExecuTorch reads files; assets are none. Copied once, under the checksum. */
    private fun file(asset: String, name: String): File {
        val file = File(context.filesDir, name)
        if (file.exists()) return file
        val partial = File(context.filesDir, "$name.partial")
        context.assets.open(asset).use { from -> partial.outputStream().use { from.copyTo(it) } }
        check(partial.renameTo(file)) { "cannot write $file" }
        return file
    }
}
