//! A plot of the tables: one bar for each row's plotted figure.

use std::fmt::Write;

use crate::report::Table;

const WIDTH: f64 = 760.0;
const LABELS: f64 = 220.0;
const BAR: f64 = 16.0;
const GAP: f64 = 6.0;
const HEADING: f64 = 34.0;

/// Bars from zero; each table has its own scale.
pub fn svg(tables: &[Table]) -> String {
    let mut body = String::new();
    let mut y = 10.0;
    for table in tables {
        let values: Vec<(&str, f64)> = table
            .rows
            .iter()
            .filter_map(|row| Some((row.first()?.shown.as_str(), row.get(table.plotted)?.value?)))
            .collect();
        let most = values.iter().map(|(_, value)| *value).fold(0.0, f64::max);
        if most <= 0.0 {
            continue;
        }
        let title = format!("{}: {}", table.name, table.columns[table.plotted]);
        // Writing to a String cannot fail.
        let _ = writeln!(
            body,
            r#"<text x="10" y="{:.0}" font-weight="bold">{}</text>"#,
            y + 16.0,
            escaped(&title)
        );
        y += HEADING - 8.0;
        for (name, value) in values {
            let length = (WIDTH - LABELS - 80.0) * value / most;
            let _ = writeln!(
                body,
                r##"<text x="{:.0}" y="{:.1}" text-anchor="end">{}</text><rect x="{LABELS:.0}" y="{y:.1}" width="{length:.1}" height="{BAR:.0}" fill="#4477aa"/><text x="{:.1}" y="{:.1}">{value:.3}</text>"##,
                LABELS - 8.0,
                y + BAR - 4.0,
                escaped(name),
                LABELS + length + 6.0,
                y + BAR - 4.0,
            );
            y += BAR + GAP;
        }
        y += GAP;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH:.0}\" height=\"{y:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
