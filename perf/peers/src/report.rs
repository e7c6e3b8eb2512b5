//! Rates, their medians and their ratios, as a table and as JSON.

use serde_json::{Value, json};

/// The results of one contestant, by round.
pub(crate) struct Outcome {
    pub(crate) name: String,
    /// Commands per second, one entry per round.
    pub(crate) rates: Vec<f64>,
}

impl Outcome {
    fn rate_median(&self) -> f64 {
        median(self.rates.clone())
    }

    /// Returns the speed relative to `other`: the median of the ratios within each round, so that a disturbance of a
    /// round affects both.
    fn ratio_to(&self, other: &Self) -> f64 {
        median(self.rates.iter().zip(&other.rates).map(|(own, others)| own / others).collect())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    assert!(!values.is_empty(), "at least one round was run");
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}

/// Formats the results, slowest first; column `×a` is the speed relative to `a`.
pub(crate) fn table(outcomes: &[Outcome]) -> String {
    let mut sorted: Vec<&Outcome> = outcomes.iter().collect();
    sorted.sort_by(|one, other| one.rate_median().total_cmp(&other.rate_median()));
    let letters = || ('a'..='z').take(sorted.len());
    let name_width = sorted.iter().map(|outcome| outcome.name.len()).max().unwrap_or(0);

    let mut table = format!("   {:name_width$} {:>12} {:>25}", "", "commands/s", "worst to best round");
    for letter in letters() {
        table.push_str(&format!(" {:>7}", format!("×{letter}")));
    }
    table.push('\n');
    for (letter, outcome) in letters().zip(&sorted) {
        let worst = outcome.rates.iter().copied().fold(f64::INFINITY, f64::min);
        let best = outcome.rates.iter().copied().fold(0.0, f64::max);
        let range = format!("{} to {}", grouped(worst), grouped(best));
        let rate = grouped(outcome.rate_median());
        table.push_str(&format!("{letter}  {:name_width$} {rate:>12} {range:>25}", outcome.name));
        for other in &sorted {
            table.push_str(&format!(" {:>7.2}", outcome.ratio_to(other)));
        }
        table.push('\n');
    }
    table
}

/// Returns the results as JSON. `ratio_to` has one entry per other contestant.
pub(crate) fn json(outcomes: &[Outcome]) -> Value {
    outcomes
        .iter()
        .map(|outcome| {
            let others = outcomes.iter().filter(|other| other.name != outcome.name);
            let ratio_to: serde_json::Map<String, Value> =
                others.map(|other| (other.name.clone(), json!(outcome.ratio_to(other)))).collect();
            json!({
                "name": outcome.name,
                "commands_per_second": outcome.rate_median(),
                "commands_per_second_by_round": outcome.rates,
                "ratio_to": ratio_to,
            })
        })
        .collect()
}

/// Formats 1234567.8 as `1,234,568`.
fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(name: &str, rates: &[f64]) -> Outcome {
        Outcome { name: name.to_owned(), rates: rates.to_vec() }
    }

    #[test]
    fn a_ratio_is_taken_within_rounds() {
        // Both medians are 20; within the rounds the second is twice, twice and half as fast.
        let (one, other) = (outcome("one", &[10.0, 20.0, 40.0]), outcome("other", &[20.0, 40.0, 20.0]));
        assert_eq!(other.ratio_to(&one), 2.0);
    }

    #[test]
    fn an_even_number_of_rounds_has_its_median_in_between() {
        assert_eq!(outcome("one", &[4.0, 1.0, 3.0, 2.0]).rate_median(), 2.5);
    }

    #[test]
    fn digits_are_grouped_by_three() {
        assert_eq!([0.4, 999.6, 123_456.0, 1_234_567.0].map(grouped), ["0", "1,000", "123,456", "1,234,567"]);
    }
}
