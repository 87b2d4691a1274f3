package org.edgetune.kit

import android.content.Context
import org.json.JSONObject
import org.pytorch.executorch.Tensor

/** Answers for texts: `TextModel(context).use { it.answer("a text").first().label }`. */
class TextModel(context: Context) : Model(context) {
    private val tokenizer = tokenizer(how.getJSONObject("wordpiece"))

    /** The classes of a text, the most likely first. */
    fun answer(text: String): List<Answer> {
        val shape = shapes.getValue("input_ids")
        val width = shape[1].toInt()
        val most = minOf(width, how.getInt("max_length"))
        val tokens = tokenizer.tokens(text + how.getString("ending"), most, how.getString("cut") == "right")
        val pad = how.getLong("pad_id")
        val ids = LongArray(width) { if (it < tokens.size) tokens[it] else pad }
        val mask = LongArray(width) { if (it < tokens.size) 1L else 0L }
        return run(
            mapOf("input_ids" to Tensor.fromBlob(ids, shape), "attention_mask" to Tensor.fromBlob(mask, shape))
        )
    }

    private fun tokenizer(piece: JSONObject): WordPiece {
        val known = JSONObject(asset(how.getString("tokenizer"))).getJSONObject("model").getJSONObject("vocab")
        return WordPiece(
            vocabulary = known.keys().asSequence().associateWith { known.getLong(it) },
            unknown = piece.getLong("unknown_id"),
            prefix = piece.getString("prefix"),
            longestWord = piece.getInt("longest_word"),
            lowercase = piece.getBoolean("lowercase"),
            stripAccents = piece.getBoolean("strip_accents"),
            clean = piece.getBoolean("clean"),
            chinese = piece.getBoolean("chinese"),
            before = longs(piece.getJSONArray("before")),
            after = longs(piece.getJSONArray("after")),
        )
    }
}
