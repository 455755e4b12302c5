//! `CallsService`: its contract is published, and no RPC of it is served by this version.

use tonic::{Request, Response, Status};

use super::proto::calls_service_server::CallsService;
use super::proto::{
    GetCallRequest, GetCallResponse, ListCallsRequest, ListCallsResponse, RecordCallRequest, RecordCallResponse,
    RecordCallsRequest, RecordCallsResponse, ReviewCallRequest, ReviewCallResponse, WatchCallsRequest,
    WatchCallsResponse,
};
use super::status::unimplemented;

pub(super) struct Calls;

#[tonic::async_trait]
impl CallsService for Calls {
    type WatchCallsStream = tokio_stream::Empty<Result<WatchCallsResponse, Status>>;

    async fn record_call(&self, _: Request<RecordCallRequest>) -> Result<Response<RecordCallResponse>, Status> {
        unimplemented("RecordCall")
    }

    async fn record_calls(&self, _: Request<RecordCallsRequest>) -> Result<Response<RecordCallsResponse>, Status> {
        unimplemented("RecordCalls")
    }

    async fn get_call(&self, _: Request<GetCallRequest>) -> Result<Response<GetCallResponse>, Status> {
        unimplemented("GetCall")
    }

    async fn list_calls(&self, _: Request<ListCallsRequest>) -> Result<Response<ListCallsResponse>, Status> {
        unimplemented("ListCalls")
    }

    async fn review_call(&self, _: Request<ReviewCallRequest>) -> Result<Response<ReviewCallResponse>, Status> {
        unimplemented("ReviewCall")
    }

    async fn watch_calls(&self, _: Request<WatchCallsRequest>) -> Result<Response<Self::WatchCallsStream>, Status> {
        unimplemented("WatchCalls")
    }
}
