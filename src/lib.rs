pub mod directory;
pub mod domain;
pub mod grpc;
pub mod keeper;
pub mod pipeline;
pub mod queue;
pub mod store;
pub mod telemetry;
