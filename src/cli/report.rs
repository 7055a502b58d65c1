//! The form of error messages (primary, detail, hint, on one screen), and the exit codes.

use std::{error::Error, process::ExitCode};

use super::CliError;

/// The exit code of a command that failed.
const FAILED: u8 = 1;
/// The exit code of bad flags or settings.
const USAGE: u8 = 2;

/// Prints an error and returns the exit code.
pub fn failed(error: &CliError) -> ExitCode {
    eprintln!("{}", render(error));
    ExitCode::from(match error {
        CliError::Config(_) => USAGE,
        CliError::Engine(_) | CliError::Observe(_) | CliError::Serve(_) | CliError::Failed(_) => {
            FAILED
        }
    })
}

/// Returns the text of an error: the error itself, the causes that add something, and the hints
/// last.
pub fn render(error: &dyn Error) -> String {
    let mut details: Vec<String> = Vec::new();
    let mut hints: Vec<String> = Vec::new();
    let mut primary = String::new();

    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default().to_owned();

        if primary.is_empty() {
            primary = first;
        } else if !primary.contains(&first) && !details.iter().any(|detail| detail.contains(&first))
        {
            details.push(first);
        }

        for line in lines {
            match (line.strip_prefix("hint: "), line.strip_prefix("detail: ")) {
                (Some(hint), _) if !hints.iter().any(|known| known == hint) => {
                    hints.push(hint.to_owned())
                }
                (None, Some(detail)) if !details.iter().any(|known| known == detail) => {
                    details.push(detail.to_owned())
                }
                (None, None) => details.push(line.to_owned()),
                _ => {}
            }
        }

        next = error.source();
    }

    let mut out = format!("error: {primary}");
    details.iter().for_each(|detail| out.push_str(&format!("\ndetail: {detail}")));
    hints.iter().for_each(|hint| out.push_str(&format!("\nhint: {hint}")));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_primary_detail_and_hint() {
        let error = CliError::Failed("a is b\ndetail: c\nhint: d".to_owned());
        assert_eq!(render(&error), "error: a is b\ndetail: c\nhint: d");
    }
}
