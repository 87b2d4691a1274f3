// Pixels to the program's input. Plain Kotlin, independent of Android.
package org.edgetune.kit

import kotlin.math.abs
import kotlin.math.floor
import kotlin.math.max
import kotlin.math.min

/** The values under carried.preprocessing in model.json; see [Model]. */
class Preparation(
    private val sizePx: Int,
    private val grey: Boolean,
    private val cropCenter: Boolean,
    private val rounded: Boolean,
    private val scale: Float,
    private val mean: FloatArray,
    private val std: FloatArray,
) {
    /** Pixels 0xAARRGGBB, row by row, upright, to channels first `(mean.size, sizePx, sizePx)`. */
    fun inputs(pixels: IntArray, width: Int, height: Int): FloatArray {
        val found = FloatArray(mean.size * sizePx * sizePx)
        var small = FloatArray(0)
        for (channel in mean.indices) {
            if (channel < (if (grey) 1 else 3)) {
                small = resized(FloatArray(pixels.size) { value(pixels[it], channel) }, width, height)
            }
            for (at in small.indices) {
                found[channel * small.size + at] = (small[at] * scale - mean[channel]) / std[channel]
            }
        }
        return found
    }

    private fun value(pixel: Int, channel: Int): Float {
        val rgb = intArrayOf(pixel shr 16 and 255, pixel shr 8 and 255, pixel and 255)
        // grey with Pillow's weights
        val one = if (grey) (rgb[0] * 19595 + rgb[1] * 38470 + rgb[2] * 7471 + 0x8000) shr 16 else rgb[channel]
        return one.toFloat()
    }

    /** The source pixels of a resized one and their weights: a triangle filter, as wide as the new pixel if larger. */
    private class Share(val first: Int, val weights: DoubleArray)

    private fun shares(oldSize: Int, begin: Double, length: Double): List<Share> =
        (0 until sizePx).map { place ->
            val scale = length / sizePx
            val reach = max(scale, 1.0)
            val center = begin + (place + 0.5) * scale
            val first = max((center - reach + 0.5).toInt(), 0)
            val end = min((center + reach + 0.5).toInt(), oldSize)
            val weights = DoubleArray(end - first) { max(0.0, 1.0 - abs((first + it + 0.5 - center) / reach)) }
            val sum = weights.sum()
            Share(first, DoubleArray(weights.size) { weights[it] / sum })
        }

    private fun kept(value: Double): Float = (if (rounded) floor(value + 0.5) else value).toFloat()

    private fun resized(plane: FloatArray, width: Int, height: Int): FloatArray {
        val side = min(width, height).toDouble()
        val across = shares(width, if (cropCenter) (width - side) / 2 else 0.0, if (cropCenter) side else width.toDouble())
        val down = shares(height, if (cropCenter) (height - side) / 2 else 0.0, if (cropCenter) side else height.toDouble())
        val narrow = FloatArray(height * sizePx)
        for (y in 0 until height) {
            for (x in 0 until sizePx) {
                var sum = 0.0
                across[x].weights.forEachIndexed { i, weight -> sum += weight * plane[y * width + across[x].first + i] }
                narrow[y * sizePx + x] = kept(sum)
            }
        }
        val found = FloatArray(sizePx * sizePx)
        for (y in 0 until sizePx) {
            for (x in 0 until sizePx) {
                var sum = 0.0
                down[y].weights.forEachIndexed { i, weight -> sum += weight * narrow[(down[y].first + i) * sizePx + x] }
                found[y * sizePx + x] = kept(sum)
            }
        }
        return found
    }
}
