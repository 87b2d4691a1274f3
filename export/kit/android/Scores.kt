// The program's output. Plain Kotlin, independent of Android.
package org.edgetune.kit

import kotlin.math.exp

/** A class and its score; the scores of all classes add up to 1. */
data class Answer(val label: String, val score: Double)

/** The classes, the most likely first. */
fun answers(logits: FloatArray, labels: List<String>): List<Answer> {
    val highest = logits.map { it.toDouble() }.reduce { a, b -> if (a > b) a else b }
    val parts = logits.map { exp(it - highest) }
    val sum = parts.sum()
    return parts
        .mapIndexed { place, part -> Answer(labels.getOrElse(place) { place.toString() }, part / sum) }
        .sortedByDescending { it.score }
}
