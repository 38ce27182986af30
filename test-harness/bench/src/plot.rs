//! A plot of the tables: for each plotted column one bar for each row. Pure.

use std::fmt::Write;

use crate::report::Table;

const WIDTH: f64 = 860.0;
const LABELS: f64 = 250.0;
/// Right of the longest bar, for its figure.
const FIGURES: f64 = 90.0;
const BAR: f64 = 16.0;
const GAP: f64 = 6.0;
const HEADING: f64 = 26.0;

/// Bars from zero; each column has its own scale.
pub fn svg(tables: &[Table]) -> String {
    let mut body = String::new();
    let mut y = 10.0;
    for table in tables {
        for column in &table.plotted {
            bars(&mut body, &mut y, table, *column);
        }
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH:.0}\" height=\"{y:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

fn bars(body: &mut String, y: &mut f64, table: &Table, column: usize) {
    let values = table.rows.iter().filter_map(|row| {
        let value = row.get(column)?.value?;
        Some((row.first()?.shown.as_str(), value))
    });
    let values: Vec<(&str, f64)> = values.collect();
    let most = values.iter().map(|(_, value)| *value).fold(0.0, f64::max);
    if most <= 0.0 {
        return;
    }
    let title = format!("{}: {}", table.name, table.columns[column]);
    // Writing to a String cannot fail.
    let _ = writeln!(
        body,
        r#"<text x="10" y="{:.0}" font-weight="bold">{}</text>"#,
        *y + 14.0,
        escaped(&title)
    );
    *y += HEADING;
    for (name, value) in values {
        // Below zero there is no bar, only its figure.
        let length = (WIDTH - LABELS - FIGURES) * (value / most).max(0.0);
        let _ = writeln!(
            body,
            r#"<text x="{:.0}" y="{:.1}" text-anchor="end">{}</text><rect x="{LABELS:.0}" y="{y:.1}" width="{length:.1}" height="{BAR:.0}" fill="{}"/><text x="{:.1}" y="{:.1}">{}</text>"#,
            LABELS - 8.0,
            *y + BAR - 4.0,
            escaped(name),
            if name.starts_with("orchestratord") {
                "#4477aa"
            } else {
                "#aab4be"
            },
            LABELS + length + 6.0,
            *y + BAR - 4.0,
            figure(value),
        );
        *y += BAR + GAP;
    }
    *y += 2.0 * GAP;
}

/// About four digits.
fn figure(value: f64) -> String {
    let decimals = match value.abs() {
        value if value >= 1000.0 => 0,
        value if value >= 10.0 => 1,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Cell;

    #[test]
    fn each_plotted_column_has_its_bars() {
        let row = |name: &str, value| vec![Cell::text(name), Cell::figure(value, 1)];
        let table = Table {
            name: "a & b".to_owned(),
            columns: vec!["side".to_owned(), "x < y".to_owned()],
            rows: vec![
                row("one", 2000.0),
                row("two", -1.0),
                vec![Cell::text("none"), Cell::text("-")],
            ],
            plotted: vec![1],
        };
        let drawn = svg(std::slice::from_ref(&table));
        assert!(drawn.contains("a &amp; b: x &lt; y"), "{drawn}");
        // The background, and one for each figure.
        assert_eq!(drawn.matches("<rect").count(), 3, "{drawn}");
        assert!(
            drawn.contains(">2000<") && !drawn.contains("width=\"-"),
            "{drawn}"
        );
        let nothing = svg(&[Table {
            plotted: Vec::new(),
            ..table
        }]);
        assert_eq!(nothing.matches("<rect").count(), 1);
    }
}
