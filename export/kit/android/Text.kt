// A text to the tokens of a BERT tokenizer. Plain Kotlin, independent of Android. A special token that is spelled out in
// a text, such as [SEP], is split like any other word: Hugging Face's tokenizer would treat it as the token.
package org.edgetune.kit

import java.text.Normalizer

/** The values under carried.preprocessing.wordpiece in model.json; see [Model]. */
class WordPiece(
    private val vocabulary: Map<String, Long>,
    private val unknown: Long,
    private val prefix: String,
    private val longestWord: Int,
    private val lowercase: Boolean,
    private val stripAccents: Boolean,
    private val clean: Boolean,
    private val chinese: Boolean,
    private val before: LongArray,
    private val after: LongArray,
) {
    /** The tokens of a text with the special ones, at most [most]. */
    fun tokens(text: String, most: Int, cutRight: Boolean): LongArray {
        val found = words(text).flatMap { pieces(it) }
        val room = most - before.size - after.size
        val inner = if (cutRight) found.take(room) else found.takeLast(room)
        return before + inner.toLongArray() + after
    }

    /** Runs of characters between spaces, and each punctuation mark. */
    private fun words(text: String): List<String> {
        val found = mutableListOf(StringBuilder())
        for (point in folded(cleaned(points(text)))) {
            val mark = isPunctuation(point)
            if ((mark || isSpace(point)) && found.last().isNotEmpty()) found.add(StringBuilder())
            if (mark || !isSpace(point)) found.last().appendCodePoint(point)
            if (mark) found.add(StringBuilder())
        }
        return found.map { it.toString() }.filter { it.isNotEmpty() }
    }

    private fun cleaned(points: List<Int>): List<Int> {
        val kept = if (clean) points.filterNot { isDropped(it) } else points
        val space = ' '.code
        return if (chinese) kept.flatMap { if (isChinese(it)) listOf(space, it, space) else listOf(it) } else kept
    }

    private fun folded(points: List<Int>): List<Int> {
        var found = points
        if (stripAccents) {
            val apart = Normalizer.normalize(string(found), Normalizer.Form.NFD)
            found = points(apart).filterNot { Character.getType(it) == Character.NON_SPACING_MARK.toInt() }
        }
        // one character at a time: a final sigma is not special
        return if (lowercase) found.flatMap { points(string(listOf(it)).lowercase()) } else found
    }

    /** The longest pieces of a word in the vocabulary, from the left; the unknown token if a piece is missing. */
    private fun pieces(word: String): List<Long> {
        val points = points(word)
        val found = mutableListOf<Long>()
        var start = 0
        while (start < points.size) {
            var end = if (points.size > longestWord) start else points.size
            while (end > start) {
                val piece = (if (start > 0) prefix else "") + string(points.subList(start, end))
                val id = vocabulary[piece]
                if (id != null) {
                    found.add(id)
                    break
                }
                end--
            }
            if (end == start) return listOf(unknown)
            start = end
        }
        return found
    }

    private companion object {
        val CHINESE =
            listOf(
                0x4E00..0x9FFF, 0x3400..0x4DBF, 0x20000..0x2A6DF, 0x2A700..0x2B73F, 0x2B740..0x2B81F,
                0x2B920..0x2CEAF, 0xF900..0xFAFF, 0x2F800..0x2FA1F,
            )
        val MARKS =
            setOf(
                Character.CONNECTOR_PUNCTUATION, Character.DASH_PUNCTUATION, Character.START_PUNCTUATION,
                Character.END_PUNCTUATION, Character.INITIAL_QUOTE_PUNCTUATION, Character.FINAL_QUOTE_PUNCTUATION,
                Character.OTHER_PUNCTUATION,
            ).map { it.toInt() }.toSet()
        val OTHERS =
            setOf(Character.CONTROL, Character.FORMAT, Character.UNASSIGNED, Character.PRIVATE_USE, Character.SURROGATE)
                .map { it.toInt() }.toSet()

        fun points(text: String): List<Int> {
            val found = ArrayList<Int>(text.length)
            var at = 0
            while (at < text.length) {
                val point = text.codePointAt(at)
                found.add(point)
                at += Character.charCount(point)
            }
            return found
        }

        fun string(points: List<Int>): String {
            val found = StringBuilder(points.size)
            points.forEach { found.appendCodePoint(it) }
            return found.toString()
        }

        fun isChinese(point: Int) = CHINESE.any { point in it }

        fun isPunctuation(point: Int) =
            point in 33..47 || point in 58..64 || point in 91..96 || point in 123..126 ||
                Character.getType(point) in MARKS

        fun isSpace(point: Int) =
            point in 9..13 || point == 0x85 || Character.isSpaceChar(point)

        fun isDropped(point: Int) =
            point == 0xFFFD || (point != 9 && point != 10 && point != 13 && Character.getType(point) in OTHERS)
    }
}
