// The program and its model.json. Keep one Model, and use it from one thread: it is not thread-safe.
package org.edgetune.kit

import android.content.Context
import java.io.Closeable
import java.io.File
import org.json.JSONArray
import org.json.JSONObject
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/** Loads `assets/model.pte`. Not on the main thread: the first time, it copies the program. */
open class Model(private val context: Context) : Closeable {
    protected val manifest = JSONObject(asset("model.json"))
    protected val carried: JSONObject = manifest.getJSONObject("carried")
    protected val how: JSONObject = carried.getJSONObject("preprocessing")
    private val labels: List<String> = strings(carried.getJSONArray("labels"))
    private val module: Module = Module.load(program().absolutePath)

    /** The shape of each input, by name, in the program's order. */
    protected val shapes: Map<String, LongArray> =
        objects(manifest.getJSONArray("calls").getJSONObject(0).getJSONArray("inputs"))
            .associate { it.getString("name") to longs(it.getJSONArray("shape")) }

    /** The classes, the most likely first. `inputs` has a tensor for each name in [shapes]. */
    protected fun run(inputs: Map<String, Tensor>): List<Answer> {
        val given = shapes.keys.map { EValue.from(inputs.getValue(it)) }
        val outputs = module.forward(*given.toTypedArray())
        check(outputs.isNotEmpty()) { "the program returned nothing: see logcat, tag ExecuTorch" }
        return answers(outputs[0].toTensor().dataAsFloatArray, labels)
    }

    override fun close() = module.destroy()

    /** ExecuTorch reads files, and an asset is not a file: copied once for each version of the program. */
    private fun program(): File {
        val file = File(context.filesDir, "${manifest.getString("sha256")}.pte")
        if (file.length() == manifest.getLong("size_bytes")) return file
        val partial = File(context.filesDir, "${file.name}.partial")
        context.assets.open("model.pte").use { from -> partial.outputStream().use { from.copyTo(it) } }
        check(partial.renameTo(file)) { "cannot write $file" }
        return file
    }

    protected fun asset(name: String): String = context.assets.open(name).bufferedReader().use { it.readText() }

    protected fun floats(from: JSONArray) = FloatArray(from.length()) { from.getDouble(it).toFloat() }

    protected fun longs(from: JSONArray) = LongArray(from.length()) { from.getLong(it) }

    private fun strings(from: JSONArray) = List(from.length()) { from.getString(it) }

    private fun objects(from: JSONArray) = List(from.length()) { from.getJSONObject(it) }
}
