package org.edgetune.kit

import android.content.Context
import android.graphics.Bitmap
import org.pytorch.executorch.Tensor

/** Answers for images: `PictureModel(context).use { it.answer(bitmap).first().label }`. */
class PictureModel(context: Context) : Model(context) {
    private val preparation =
        Preparation(
            sizePx = how.getInt("size_px"),
            grey = how.getString("color") == "grey",
            cropCenter = how.getString("crop") == "center",
            rounded = how.getBoolean("rounded"),
            scale = how.getDouble("scale").toFloat(),
            mean = floats(how.getJSONArray("mean")),
            std = floats(how.getJSONArray("std")),
        )

    /** The classes of an upright image, the most likely first: a Bitmap has no orientation. */
    fun answer(picture: Bitmap): List<Answer> {
        val plain = if (picture.config == Bitmap.Config.ARGB_8888) picture else picture.copy(Bitmap.Config.ARGB_8888, false)
        val pixels = IntArray(plain.width * plain.height)
        plain.getPixels(pixels, 0, plain.width, 0, 0, plain.width, plain.height)
        val (name, shape) = shapes.entries.single()
        return run(mapOf(name to Tensor.fromBlob(preparation.inputs(pixels, plain.width, plain.height), shape)))
    }
}
