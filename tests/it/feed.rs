//! The change feed from outside: what a client that keeps a map of rows and a token ends with, whatever happens meanwhile.

mod bounds;
mod door;
mod model;
mod proof;
mod rows;
mod seed;
mod unfit;
mod watched;
mod watcher;
mod work;
mod writer;
