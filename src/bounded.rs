//! No more of another server's answer than it may have.

use reqwest::{Error, Response};

/// The body of an answer; none if it has more bytes than `most`, of which no more are read. An error does not tell the address.
pub async fn body(mut response: Response, most: usize) -> Result<Option<Vec<u8>>, Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(Error::without_url)? {
        if body.len() + chunk.len() > most {
            return Ok(None);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Some(body))
}
