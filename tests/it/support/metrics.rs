//! What `/metrics` of a running server says.

use super::process::{Server, client};

#[derive(Debug)]
pub struct Metrics(String);

impl Metrics {
    pub async fn of(server: &Server) -> Self {
        let answer = client().get(format!("http://{}/metrics", server.admin)).send().await.expect("it answers");
        Self(answer.text().await.expect("a whole answer"))
    }

    /// The value of the line with this name and all these labels.
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let line = self.0.lines().find(|line| {
            let after = line.strip_prefix(name);
            after.is_some_and(|rest| rest.starts_with(['{', ' ']))
                && labels.iter().all(|(label, value)| line.contains(&format!("{label}=\"{value}\"")))
        })?;
        line.rsplit_once(' ')?.1.parse().ok()
    }
}
