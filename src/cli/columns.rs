//! Aligned columns for people.

use comfy_table::{ContentArrangement, Table, presets};

use crate::telemetry::plain;

/// A value on one line, of at most so many characters; an ellipsis and its length say where it was cut.
pub(super) fn cell(value: &str, length_max: usize) -> String {
    let shown = match value.char_indices().nth(length_max) {
        Some((end, _)) => {
            format!("{}\u{2026} ({} bytes)", value.get(..end).unwrap_or_default(), value.len())
        }
        None => value.to_owned(),
    };
    line(&shown)
}

/// A text on one line.
pub(super) fn line(text: &str) -> String {
    plain(text).replace('\n', "\\n").replace('\t', "\\t")
}

/// Rows in columns as wide as their widest cell, as a terminal shows it: some letters take two places.
pub(super) fn aligned<Row: AsRef<[String]>>(rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    for row in rows {
        table.add_row(row.as_ref());
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows =
            [["METRIC", "AVG"], ["größe", "1"], ["a", "0.5"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(aligned(&rows), "METRIC  AVG\ngröße   1\na       0.5\n");
        let rows = [["模型", "1"], ["model", "2"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(aligned(&rows), "模型   1\nmodel  2\n");
    }

    #[test]
    fn a_cell_is_one_short_line() {
        assert_eq!(cell("a\u{1b}[2J\n\u{202e}b", 40), "a\\u001b[2J\\n\\u202eb");
        assert_eq!(cell(&"x".repeat(5000), 3), "xxx\u{2026} (5000 bytes)");
        assert_eq!(cell("größe", 5), "größe");
    }
}
