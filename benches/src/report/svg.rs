//! Charts as SVG elements: bars, lines, and a waterfall.
//!
//! Invariant: every text from outside is escaped, every coordinate is finite and inside the
//! picture. Colours and fonts are attributes, so a picture stands by itself.

use std::fmt::Write as _;

/// Width of a chart, pixels.
const WIDTH: f64 = 860.0;
/// Where the plot begins: room for names on its left.
const LEFT: f64 = 190.0;
/// Room for figures on its right.
const RIGHT: f64 = 90.0;
/// Height of a bar with its gap.
const BAR: f64 = 20.0;
/// Height of a line chart's plot.
const PLOT: f64 = 240.0;
/// Colours of series, told apart also without colour vision (Okabe and Ito).
const COLOURS: [&str; 8] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#b8a800",
];

/// A bar: from `start` on, `length` long, in the units of the chart.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Bar {
    /// On its left.
    pub(super) name: String,
    /// Where it begins.
    pub(super) start: f64,
    /// How long it is.
    pub(super) length: f64,
    /// On its right.
    pub(super) figure: String,
}

/// A line: points from left to right.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Line {
    /// In the legend.
    pub(super) name: String,
    /// x and y, in the units of the chart.
    pub(super) points: Vec<(f64, f64)>,
}

/// Text made safe between tags and in quotes.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// Horizontal bars on one scale; `limit` is marked by a dashed line across all.
pub(super) fn bars(bars: &[Bar], limit: Option<f64>) -> String {
    let ends = bars.iter().map(|bar| bar.start + bar.length);
    let scale = Scale::new(ends.chain(limit), WIDTH - LEFT - RIGHT);
    let bottom = BAR * bars.len() as f64;
    let mut out = open(bottom + 16.0);
    for (row, bar) in bars.iter().enumerate() {
        let top = BAR * row as f64;
        let (x, width) = (LEFT + scale.at(bar.start), scale.at(bar.length).max(1.0));
        let _ = write!(
            out,
            "{}<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"{}\"/>{}",
            label(LEFT - 6.0, top + 14.0, "end", &bar.name),
            top + 2.0,
            BAR - 4.0,
            colour(row),
            label(x + width + 4.0, top + 14.0, "start", &bar.figure),
        );
    }
    if let Some(limit) = limit {
        let x = LEFT + scale.at(limit);
        let _ = write!(
            out,
            "<line x1=\"{x:.1}\" y1=\"0\" x2=\"{x:.1}\" y2=\"{bottom:.1}\" stroke=\"#000\" stroke-dasharray=\"4 3\"/>{}",
            label(x, bottom + 12.0, "middle", "limit"),
        );
    }
    out + "</svg>\n"
}

/// Lines over one pair of axes that begin at 0.
pub(super) fn lines(lines: &[Line], x_title: &str, y_title: &str) -> String {
    let all = || lines.iter().flat_map(|line| line.points.iter());
    let x = Scale::new(all().map(|p| p.0), WIDTH - LEFT - RIGHT);
    let y = Scale::new(all().map(|p| p.1), PLOT);
    let mut out = open(PLOT + 40.0);
    let _ = write!(
        out,
        "<path d=\"M{LEFT:.1} 0V{PLOT:.1}H{:.1}\" fill=\"none\" stroke=\"#888\"/>{}{}{}",
        WIDTH - RIGHT,
        label(
            WIDTH - RIGHT,
            PLOT + 16.0,
            "end",
            &format!("{:.2} {x_title}", x.most)
        ),
        label(LEFT, PLOT + 16.0, "middle", "0"),
        label(
            LEFT + 6.0,
            12.0,
            "start",
            &format!("{:.1} {y_title}", y.most)
        ),
    );
    for (row, line) in lines.iter().enumerate() {
        let points: Vec<String> = line
            .points
            .iter()
            .map(|p| format!("{:.1},{:.1}", LEFT + x.at(p.0), PLOT - y.at(p.1)))
            .collect();
        let top = BAR * row as f64;
        let _ = write!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2\"/>\
             <rect x=\"0\" y=\"{:.1}\" width=\"10\" height=\"10\" fill=\"{}\"/>{}",
            points.join(" "),
            colour(row),
            top + 4.0,
            colour(row),
            label(14.0, top + 14.0, "start", &line.name),
        );
    }
    out + "</svg>\n"
}

/// From units to pixels, 0 to the greatest value on the whole length.
struct Scale {
    most: f64,
    pixels: f64,
}

impl Scale {
    fn new(values: impl Iterator<Item = f64>, pixels: f64) -> Self {
        let most = values.filter(|v| v.is_finite()).fold(0.0, f64::max);
        Self { most, pixels }
    }

    fn at(&self, value: f64) -> f64 {
        let part = value / self.most;
        if part.is_finite() {
            part.clamp(0.0, 1.0) * self.pixels
        } else {
            0.0
        }
    }
}

fn open(height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">"
    )
}

fn label(x: f64, y: f64, anchor: &str, text: &str) -> String {
    let text = escape(text);
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>")
}

fn colour(row: usize) -> &'static str {
    COLOURS.get(row % COLOURS.len()).unwrap_or(&"#000")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(name: &str, start: f64, length: f64) -> Bar {
        Bar {
            name: name.to_owned(),
            start,
            length,
            figure: format!("{length} s"),
        }
    }

    #[test]
    fn texts_are_escaped() {
        assert_eq!(
            escape("<a href=\"x\">&'\u{1}"),
            "&lt;a href=&quot;x&quot;&gt;&amp;&#39; "
        );
        let chart = bars(&[bar("<script>", 0.0, 1.0)], None);
        assert!(chart.contains("&lt;script&gt;") && !chart.contains("<script"));
    }

    #[test]
    fn the_longest_bar_fills_the_plot_and_the_limit_is_marked() {
        let chart = bars(&[bar("a", 0.0, 4.0), bar("b", 0.0, 1.0)], Some(2.0));
        assert!(chart.contains("width=\"580.0\"") && chart.contains("width=\"145.0\""));
        assert!(chart.contains("x1=\"480.0\"") && chart.contains(">limit<"));
    }

    #[test]
    fn nothing_and_nonsense_stay_inside_the_picture() {
        let nonsense = [bar("n", f64::NAN, f64::INFINITY), bar("m", -1.0, -5.0)];
        for chart in [
            bars(&[], None),
            bars(&nonsense, Some(f64::NAN)),
            lines(&[], "s", "MB"),
            lines(
                &[Line {
                    name: "x".into(),
                    points: vec![(f64::NAN, 1.0), (0.0, f64::INFINITY)],
                }],
                "s",
                "MB",
            ),
        ] {
            let drawn = chart.replace("<text", "\n<text");
            let figures = drawn.lines().filter(|l| !l.starts_with("<text"));
            assert!(
                figures
                    .clone()
                    .all(|l| !l.contains("NaN") && !l.contains("inf")),
                "{chart}"
            );
            assert!(chart.starts_with("<svg") && chart.ends_with("</svg>\n"));
        }
    }

    #[test]
    fn lines_end_at_the_corners() {
        let line = Line {
            name: "laz".into(),
            points: vec![(0.0, 0.0), (2.0, 10.0)],
        };
        let chart = lines(&[line], "s", "MB");
        assert!(
            chart.contains("points=\"190.0,240.0 770.0,0.0\""),
            "{chart}"
        );
    }
}
